"""Host memory lies in huge pages where the machine has them."""

import ctypes
import mmap
import re

import numpy as np
import pytest

import pyvmm

HUGE_PAGE_BYTES = 2 << 20


def huge_bytes(begin, end):
    """Bytes of huge pages in the mappings that begin within [begin, end)."""
    total, is_inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            mapping = re.match("([0-9a-f]+)-[0-9a-f]+ ", line)
            if mapping:
                is_inside = begin <= int(mapping[1], 16) < end
            elif is_inside and line.startswith("AnonHugePages:"):
                total += int(line.split()[1]) * 1024
    return total


def need_huge_pages():
    """Memory that asks for them, whoever takes it, gets some."""
    n_bytes = 8 * HUGE_PAGE_BYTES
    with mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(bytes(n_bytes))
        whole = ctypes.c_char.from_buffer(memory)
        begin = ctypes.addressof(whole)
        got = huge_bytes(begin - n_bytes, begin + n_bytes)
        del whole
    if not got:
        pytest.skip("no huge pages of 2 MiB here")


@pytest.mark.parametrize("layout", ["seq", "lane", "c"])
def test_one_large_growth(layout):
    """Whatever the size of its blocks: none of a lane of 8 MiB is as large as a huge page."""
    need_huge_pages()
    x = np.arange(2 * 8192 * 256, dtype="int32").reshape(2, 8192, 256)
    with pyvmm.empty((2, 0, 256), "int32", axis=1, capacity=16384, layout=layout) as t:
        t.append(x)
        stats = t.stats()
        assert stats["block_count"] > 2 * stats["mapped_bytes"] // HUGE_PAGE_BYTES
        got = huge_bytes(t.ptr, t.ptr + stats["reserved_bytes"])
        assert got >= stats["mapped_bytes"] // 2
        assert np.array_equal(np.asarray(t), x)
