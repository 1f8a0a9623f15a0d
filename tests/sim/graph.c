/* graph.c - graphs: what a capture recorded, and running it again.
 *
 * A launch gives the nodes to one stream in the order in which they were captured. That is
 * one of the orders the real driver may choose; branches do not run side by side.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#define GRAPH_ALIVE 0x6EA9A11Eu
#define GRAPH_DEAD 0x6EA9DEADu

struct sim_graph_exec {
    uint32_t magic;
    sim_graph *graph;
    sim_clock *last; /* launches of one executable graph follow one another */
};

static sim_handles graphs, execs, user_objects;

/* ---- user objects ------------------------------------------------------------------------------ */
/* The real driver calls the destructor on a thread of its own, perhaps later. It may not call
 * the driver, so the lock may be held. */
static void drop(sim_user_object *object, size_t n) {
    object->n_references -= n;
    if (object->n_references)
        return;
    object->magic = GRAPH_DEAD;
    sim_call_back(object->destroy, object->user_data);
}

static sim_user_object *object_of(CUuserObject handle, CUresult *status) {
    bool known = sim_handles_has(&user_objects, handle);
    *status = CUDA_SUCCESS;
    if (known && handle->magic == GRAPH_ALIVE)
        return handle;
    *status = sim_refuse(CUDA_ERROR_INVALID_VALUE,
                         known ? "user object %p is gone" : "%p is no user object", (void *)handle);
    return NULL;
}

CUresult cuUserObjectCreate(CUuserObject *out, void *user_data, CUhostFn destroy,
                            unsigned n_references, unsigned flags) {
    CUresult status = sim_enter(SIM_cuUserObjectCreate);
    if (status)
        return status;
    if (!out || !destroy || !n_references || flags != CU_USER_OBJECT_NO_DESTRUCTOR_SYNC)
        return sim_leave(
            sim_refuse(CUDA_ERROR_INVALID_VALUE, "%u references, flags 0x%x", n_references, flags));
    sim_user_object *object = sim_alloc(sizeof *object);
    *object = (sim_user_object){GRAPH_ALIVE, n_references, destroy, user_data};
    sim_handles_add(&user_objects, object);
    *out = object;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuUserObjectRetain(CUuserObject handle, unsigned n_references) {
    CUresult status = sim_enter(SIM_cuUserObjectRetain);
    if (status)
        return status;
    sim_user_object *object = object_of(handle, &status);
    if (object)
        object->n_references += n_references;
    return sim_leave(status);
}

CUresult cuUserObjectRelease(CUuserObject handle, unsigned n_references) {
    CUresult status = sim_enter(SIM_cuUserObjectRelease);
    if (status)
        return status;
    sim_user_object *object = object_of(handle, &status);
    if (object && n_references > object->n_references)
        status = sim_refuse(CUDA_ERROR_INVALID_VALUE, "%u references of %lu", n_references,
                            object->n_references);
    else if (object)
        drop(object, n_references);
    return sim_leave(status);
}

static void keep(sim_graph *graph, sim_user_object *object) {
    graph->kept = sim_grow(graph->kept, (graph->n_kept + 1) * sizeof(graph->kept[0]));
    graph->kept[graph->n_kept++] = object;
}

/* ---- graphs ------------------------------------------------------------------------------------ */
sim_graph *sim_graph_new(void) {
    sim_graph *graph = sim_alloc(sizeof *graph);
    graph->magic = GRAPH_ALIVE;
    sim_handles_add(&graphs, graph);
    return graph;
}

size_t sim_graph_add(sim_graph *graph, const sim_op *op, const sim_nodes *after) {
    if (graph->n_nodes == graph->capacity) {
        graph->capacity = graph->capacity ? 2 * graph->capacity : 16;
        graph->node = sim_grow(graph->node, graph->capacity * sizeof *graph->node);
    }
    sim_node *node = &graph->node[graph->n_nodes];
    node->op = sim_op_copy(op);
    node->after = NULL;
    if (after) {
        size_t bytes = sizeof *after + after->n * sizeof after->index[0];
        node->after = sim_alloc(bytes);
        memcpy(node->after, after, bytes);
    }
    return graph->n_nodes++;
}

void sim_graph_free(sim_graph *graph) {
    for (size_t i = 0; i < graph->n_nodes; i++) {
        sim_op_drop(&graph->node[i].op);
        free(graph->node[i].after);
    }
    free(graph->node);
    for (size_t i = 0; i < graph->n_kept; i++)
        drop(graph->kept[i], 1);
    free(graph->kept);
    *graph = (sim_graph){.magic = GRAPH_DEAD};
}

static sim_graph *graph_of(CUgraph handle, CUresult *status) {
    bool known = sim_handles_has(&graphs, handle);
    *status = CUDA_SUCCESS;
    if (known && handle->magic == GRAPH_ALIVE)
        return handle;
    *status =
        sim_refuse(CUDA_ERROR_INVALID_VALUE,
                   known ? "graph %p was destroyed before" : "%p is no graph", (void *)handle);
    return NULL;
}

CUresult cuGraphRetainUserObject(CUgraph graph_handle, CUuserObject handle, unsigned n_references,
                                 unsigned flags) {
    CUresult status = sim_enter(SIM_cuGraphRetainUserObject);
    if (status)
        return status;
    sim_graph *graph = graph_of(graph_handle, &status);
    sim_user_object *object = graph ? object_of(handle, &status) : NULL;
    if (object && (!n_references || flags & ~(unsigned)CU_GRAPH_USER_OBJECT_MOVE ||
                   (flags && n_references > object->n_references)))
        status =
            sim_refuse(CUDA_ERROR_INVALID_VALUE, "%u references, flags 0x%x", n_references, flags);
    for (unsigned i = 0; i < n_references && status == CUDA_SUCCESS; i++)
        keep(graph, object);
    if (status == CUDA_SUCCESS && !flags)
        object->n_references += n_references;
    return sim_leave(status);
}

CUresult cuGraphReleaseUserObject(CUgraph graph_handle, CUuserObject handle,
                                  unsigned n_references) {
    CUresult status = sim_enter(SIM_cuGraphReleaseUserObject);
    if (status)
        return status;
    sim_graph *graph = graph_of(graph_handle, &status);
    sim_user_object *object = graph ? object_of(handle, &status) : NULL;
    for (size_t i = graph ? graph->n_kept : 0; object && n_references && i-- > 0;)
        if (graph->kept[i] == object) {
            graph->kept[i] = graph->kept[--graph->n_kept];
            n_references--;
            drop(object, 1);
        }
    if (object && n_references)
        status =
            sim_refuse(CUDA_ERROR_INVALID_VALUE, "the graph has %u references fewer", n_references);
    return sim_leave(status);
}

static struct sim_graph_exec *exec_of(CUgraphExec handle, CUresult *status) {
    bool known = sim_handles_has(&execs, handle);
    *status = CUDA_SUCCESS;
    if (known && handle->magic == GRAPH_ALIVE)
        return handle;
    *status =
        sim_refuse(CUDA_ERROR_INVALID_VALUE,
                   known ? "executable graph %p was destroyed before" : "%p is no executable graph",
                   (void *)handle);
    return NULL;
}

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode *nodes, size_t *n_nodes) {
    CUresult status = sim_enter(SIM_cuGraphGetNodes);
    if (status)
        return status;
    sim_graph *graph = graph_of(handle, &status);
    for (size_t i = 0; graph && nodes && i < *n_nodes; i++)
        nodes[i] = i < graph->n_nodes ? (CUgraphNode)&graph->node[i] : NULL;
    if (graph && (!nodes || *n_nodes > graph->n_nodes))
        *n_nodes = graph->n_nodes;
    return sim_leave(status);
}

CUresult cuGraphDestroy(CUgraph handle) {
    CUresult status = sim_enter(SIM_cuGraphDestroy);
    if (status)
        return status;
    sim_graph *graph = graph_of(handle, &status);
    if (graph)
        sim_graph_free(graph);
    return sim_leave(status);
}

/* ---- executable graphs -------------------------------------------------------------------------- */
static CUresult instantiate(sim_call call, CUgraphExec *out, CUgraph handle) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    sim_graph *graph = graph_of(handle, &status);
    if (!graph)
        return sim_leave(status);
    struct sim_graph_exec *exec = sim_alloc(sizeof *exec);
    exec->magic = GRAPH_ALIVE;
    exec->graph = sim_graph_new();
    for (size_t i = 0; i < graph->n_nodes; i++)
        sim_graph_add(exec->graph, &graph->node[i].op, graph->node[i].after);
    for (size_t i = 0; i < graph->n_kept; i++) {
        graph->kept[i]->n_references++;
        keep(exec->graph, graph->kept[i]);
    }
    sim_handles_add(&execs, exec);
    *out = exec;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuGraphInstantiate_v2(CUgraphExec *out, CUgraph graph, CUgraphNode *error_node, char *log,
                               size_t log_bytes) {
    (void)error_node, (void)log, (void)log_bytes;
    return instantiate(SIM_cuGraphInstantiate, out, graph);
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    (void)flags;
    return instantiate(SIM_cuGraphInstantiateWithFlags, out, graph);
}

CUresult cuGraphInstantiateWithParams(CUgraphExec *out, CUgraph graph,
                                      CUDA_GRAPH_INSTANTIATE_PARAMS *params) {
    CUresult status = instantiate(SIM_cuGraphInstantiateWithParams, out, graph);
    params->hErrNode_out = NULL;
    params->result_out = status;
    return status;
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
    CUresult status = sim_enter(SIM_cuGraphExecDestroy);
    if (status)
        return status;
    struct sim_graph_exec *exec = exec_of(handle, &status);
    if (!exec)
        return sim_leave(status);
    sim_graph_free(exec->graph);
    free(exec->last);
    exec->magic = GRAPH_DEAD;
    exec->last = NULL;
    return sim_leave(CUDA_SUCCESS);
}

static CUresult run_node(sim_stream *stream, const sim_op *node) {
    if (stream->capture)
        return sim_capture_add(stream, node);
    if (node->kind == SIM_OP_WAIT || node->kind == SIM_OP_RECORD) {
        CUresult status;
        sim_event *event = sim_event_of(node->u.event, &status);
        if (event && node->kind == SIM_OP_RECORD)
            status = sim_event_record_now(event, stream);
        else if (event)
            sim_clock_merge(&stream->clock, event->clock);
        return status;
    }
    sim_op op = sim_op_copy(node);
    return sim_enqueue(stream, &op);
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    CUresult status = sim_enter(SIM_cuGraphLaunch);
    if (status)
        return status;
    struct sim_graph_exec *exec = exec_of(handle, &status);
    sim_stream *stream = exec ? sim_stream_of(stream_handle, &status) : NULL;
    if (stream && stream->legacy)
        status = sim_capture_implicit(stream);
    if (status)
        return sim_leave(status);
    if (!stream->capture)
        sim_clock_merge(&stream->clock, exec->last);
    for (size_t i = 0; i < exec->graph->n_nodes && status == CUDA_SUCCESS; i++)
        status = run_node(stream, &exec->graph->node[i].op);
    if (status == CUDA_ERROR_INVALID_VALUE) /* here no one looks at addresses beforehand */
        status = sim.poison = CUDA_ERROR_LAUNCH_FAILED;
    if (!stream->capture)
        sim_clock_merge(&exec->last, stream->clock);
    return sim_leave(status);
}
