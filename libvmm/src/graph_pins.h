/* graph_pins.h - a graph that appends keeps its tensors. */
#ifndef VMM_GRAPH_PINS_H
#define VMM_GRAPH_PINS_H

#include "tensor.h"

/* The tensor is kept, as captured, until the graph that `stream` is being captured into is gone. */
vmm_status graph_pins_add(vmm_tensor *tensor, vmm_stream stream, uint64_t capture);

#endif /* VMM_GRAPH_PINS_H */
