"""Which devices the tests run on, and what every test is given and checked for.

PYVMM_TEST_DEVICE
    unset   "host", and "cuda:0" where a CUDA driver and a GPU are there
    sim     "cuda:0" on the simulated driver, which VMM_CUDA_LIBRARY names
    sim-hip "hip:0" on the simulated driver under HIP's names, which VMM_HIP_LIBRARY names
    a name  that device alone ("host", "cuda:0", "hip:0")
"""

import functools
import gc
import os
import time

import pytest

import cuda_helper
import pyvmm

SIMULATED = os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip")


def _find_devices():
    chosen = os.environ.get("PYVMM_TEST_DEVICE")
    if SIMULATED:
        return [cuda_helper.NAME]
    if chosen:
        return [chosen]
    try:
        pyvmm.default_pool("cuda:0")
    except pyvmm.VMMError as error:
        if error.status not in ("VMM_ERR_NO_DRIVER", "VMM_ERR_NO_DEVICE"):
            raise
        return ["host"]
    return ["host", "cuda:0"]


DEVICES = _find_devices()


def pytest_configure(config):
    config.addinivalue_line("markers", "keeps_memory: leaves memory in use in a default pool")
    config.addinivalue_line("markers", "frameworks: of whole models, by make test-frameworks")


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device there is, one after the other."""
    return request.param


@pytest.fixture
def host():
    if "host" not in DEVICES:
        pytest.skip("the host is tested without PYVMM_TEST_DEVICE")
    return "host"


@pytest.fixture
def cuda():
    """The GPU, whose ever it is."""
    if cuda_helper.NAME not in DEVICES:
        pytest.skip("no CUDA device; PYVMM_TEST_DEVICE=sim runs this on the simulated driver")
    return cuda_helper.NAME


@pytest.fixture
def full_device(cuda):
    """For tests that take all memory of the device, which they give back."""
    if not SIMULATED and os.environ.get("PYVMM_TEST_EXHAUST") != "1":
        pytest.skip("takes all memory of the GPU: PYVMM_TEST_EXHAUST=1 allows it")
    gc.collect()
    pyvmm.default_pool(cuda).trim(wait=True)
    return cuda


def pytest_collection_modifyitems(items):
    """A test of CUDA that takes its tensors from fixtures for every device has no case of the
    host; where there is no other, it stays, to say that it was skipped."""
    if cuda_helper.NAME not in DEVICES:
        return
    items[:] = [
        item
        for item in items
        if "cuda" not in item.fixturenames
        or getattr(item, "callspec", None) is None
        or item.callspec.params.get("device") != "host"
    ]


@pytest.fixture
def simulator():
    """The simulated driver's library, to let its calls fail."""
    if not SIMULATED:
        pytest.skip("needs the simulated driver: PYVMM_TEST_DEVICE=sim")
    library = cuda_helper.load()
    yield library
    library.vmm_sim_fail_none()


def _in_use():
    return {name: pyvmm.default_pool(name).stats()["in_use_bytes"] for name in DEVICES}


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """What a test took from the default pools, it has given back."""
    before = _in_use()
    yield
    if request.node.get_closest_marker("keeps_memory"):
        return
    if _in_use() != before:
        gc.collect()  # only then, for it takes longer than most tests
    for _ in range(200):  # a driver may take its time to let go of what a graph kept
        left = {name: n_bytes - before[name] for name, n_bytes in _in_use().items()}
        if not any(n_bytes > 0 for n_bytes in left.values()):
            return
        time.sleep(0.01)
    pytest.fail(f"left behind: {left}")


@pytest.fixture
def make_pool(device):
    """Pools of the test's own. Closing them fails if the test left a tensor behind."""
    made = []

    def make(**arguments):
        made.append(pyvmm.Pool(device, **arguments))
        return made[-1]

    yield make
    for pool in made:
        try:
            pool.close()
        except pyvmm.VMMError:
            gc.collect()
            pool.close()


@pytest.fixture
def pool(make_pool):
    return make_pool()


@pytest.fixture
def empty(device):
    """pyvmm.empty() on the device; by default 1000 rows of four float32."""
    return functools.partial(
        pyvmm.empty, shape=(0, 4), dtype="float32", axis=0, capacity=1000, device=device
    )


@pytest.fixture
def streams(cuda):
    """Three streams, without order between them and the default one."""
    made = [cuda_helper.Stream() for _ in range(3)]
    yield made
    cuda_helper.synchronize()
    for stream in made:
        stream.close()


@pytest.fixture
def arrays(cuda):
    """arrays(kind, contents, ...): device arrays that are freed at the end."""
    made = []

    def make(kind, *arguments):
        made.append(kind(*arguments))
        return made[-1]

    yield make
    cuda_helper.synchronize()
    while made:
        made.pop().free()
