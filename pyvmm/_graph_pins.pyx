# cython: language_level=3, embedsignature=True
"""Who keeps the tensors of a captured graph, where that is not the graph itself."""

import weakref

cimport cython

from pyvmm._device cimport canonical_name, open_device
from pyvmm._error cimport check
from pyvmm._libvmm cimport (
    vmm_device,
    vmm_device_close,
    vmm_graph_pins,
    vmm_graph_pins_close,
    vmm_graph_pins_open,
    vmm_status,
    vmm_stream,
)
from pyvmm._stream cimport stream_of


@cython.final
cdef class GraphPins:
    """Keeps the tensors that a graph appends to, in the graph's place.

        with pool.capturing(), torch.cuda.graph(graph, stream=stream):
            pyvmm.GraphPins(stream, owner=graph)
            t.append(row)

    A graph that appends to a tensor keeps it, or a replay would write to memory of others. It
    does so by itself, through an object of CUDA's for which the driver makes each of its launches
    dearer (1.7 us on an H100, driver 580). This does it in Python: made while `stream` is being
    captured and before the first append, it pins what the capture appends to, on this device,
    from any stream.

    stream: the one that is being captured, see VTensor.append()
    owner:  pinned until it is collected: a graph object of a framework. None: until close(), or
            until this GraphPins is collected
    device: of the stream: "cuda", "cuda:1", "hip"

    Raises ValueError (the stream is not being captured, the host), TypeError (an owner that weak
    references cannot refer to), VMMError (the capture has been invalidated)."""
    cdef vmm_graph_pins *handle
    cdef bint is_made
    cdef object __weakref__

    def __init__(self, stream, owner=None, *, device="cuda"):
        cdef vmm_stream captured = NULL
        cdef vmm_device *opened
        cdef vmm_status status
        if self.is_made:
            raise TypeError("a GraphPins is of one capture: make another")
        stream_of(stream, &captured)
        if owner is not None:
            weakref.ref(owner)  # raises, before anything is held
        opened = open_device(canonical_name(device))
        self.is_made = True
        with nogil:
            status = vmm_graph_pins_open(opened, captured, &self.handle)
            vmm_device_close(opened)
        check(status)
        if owner is not None:
            # Which keeps this object. At exit the graph may still run.
            weakref.finalize(owner, self.close).atexit = False

    def __dealloc__(self):
        with nogil:
            vmm_graph_pins_close(self.handle)

    def close(self):
        """Unpin: the graph, and all that was made of it, has been destroyed, or its capture has
        failed. Replays may still be in flight. Closing twice is fine."""
        cdef vmm_graph_pins *handle = self.handle
        self.handle = NULL
        with nogil:
            vmm_graph_pins_close(handle)

    def __reduce__(self):
        raise TypeError("a GraphPins cannot be pickled or copied")

    def __copy__(self):
        self.__reduce__()

    def __deepcopy__(self, memo):
        self.__reduce__()
