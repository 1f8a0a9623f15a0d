"""The defects that plant.py plants, each with the test that must notice it.

A replacement is exact and must fit the source once. Where it no longer does, the run fails:
mend it here with the change of the source.
"""

from dataclasses import dataclass

C = "tests/c/{}.c"
PY = "tests/python/{}"


@dataclass(frozen=True)
class Defect:
    name: str
    says: str  # what is wrong with the library, for the table
    file: str
    replacements: tuple  # of (from, to)
    test: str  # a C program's source, run on the simulated cuda:0, or a pytest id
    on: str = "cuda:0"


def replaces(*texts):
    """Pairs of what is there and what is planted."""
    return tuple(zip(texts[::2], texts[1::2], strict=True))


DEFECTS = [
    # ---- those the project promises to notice ------------------------------------------
    Defect(
        "access",
        "no access call for blocks that are taken back into use",
        "libvmm/src/range.c",
        replaces("               lane->live_bytes < lane->open_bytes)\n", "               true)\n"),
        C.format("test_undo"),
    ),
    Defect(
        "release",
        "a block's handle is never released",
        "libvmm/src/pool.c",
        replaces(
            "vmm_status status = DRIVER(pool, work->tensor_calls, release, block->handle, "
            "block->bytes);",
            "vmm_status status = VMM_OK;",
        ),
        C.format("test_queue"),
    ),
    Defect(
        "fence",
        "queued blocks are unmapped without a fence",
        "libvmm/src/queue.c",
        replaces(
            "    return !pool->device->ops->is_async || pool->fences_passed > entry->epoch;",
            "    (void)pool, (void)entry;\n    return true;",
        ),
        C.format("test_queue"),
    ),
    Defect(
        "slack",
        "the block policy is off by one step: a block may be twice as large",
        "libvmm/src/range.c",
        replaces(
            "while (size * 2 <= offset / 8 + granularity &&",
            "while (size <= offset / 8 + granularity &&",
        ),
        C.format("test_slack"),
    ),
    Defect(
        "length",
        "the length counts the rows of an append that failed",
        "libvmm/src/append.c",
        replaces(
            "        if (status)\n            continue;\n        if (outcome.captured)",
            "        if (outcome.captured)",
        ),
        C.format("test_undo"),
    ),
    Defect(
        "export-count",
        "an export that is dropped is still counted",
        "libvmm/src/pin.c",
        replaces("    free(pin);\n    tensor_unreference(tensor);\n", "    free(pin);\n"),
        C.format("test_pins"),
    ),
    Defect(
        "capsule",
        "a DLPack capsule's deleter forgets the export",
        "pyvmm/_dlpack.pyx",
        replaces("    vmm_unpin(export.pin)\n", "    pass\n"),
        PY.format("test_exports.py::test_consumed_capsule_pins_until_it_is_deleted"),
    ),
    Defect(
        "twice",
        "a block is given back to the pool twice",
        "libvmm/src/range.c",
        replaces(
            "    pool_give_block(work, block, release && block->fresh);\n",
            "    pool_give_block(work, block, release && block->fresh);\n"
            "    pool_give_block(work, block, release && block->fresh);\n",
        ),
        C.format("test_queue"),
    ),
    # ---- memory -------------------------------------------------------------------------
    Defect(
        "addresses",
        "a closed tensor's reservation is not returned",
        "libvmm/src/range.c",
        replaces(
            "first = DRIVER(range->pool, work->tensor_calls, free, range->base, range->bytes);",
            "first = VMM_OK;",
        ),
        C.format("test_lifetime"),
    ),
    Defect(
        "parked",
        "blocks that the driver refused to take back are not tried again",
        "libvmm/src/queue.c",
        replaces("bool retry = pool->bytes[POOL_PARKED] > 0;", "bool retry = false;"),
        C.format("test_undo"),
    ),
    Defect(
        "undo-late",
        "an undo unmaps what submitted work may have touched",
        "libvmm/src/range.c",
        replaces(
            "        put_back(change->range, mark, touched);\n",
            "        put_back(change->range, mark, false);\n",
            "        if (!touched && work)\n",
            "        if (work)\n",
        ),
        C.format("test_undo"),
    ),
    Defect(
        "epoch",
        "what is queued after a fence was recorded counts as before it",
        "libvmm/src/queue.c",
        replaces(
            "    entry->epoch = pool->fences_recorded;\n",
            "    if (!entry->linked)\n        entry->epoch = pool->fences_recorded;\n",
        ),
        C.format("test_queue"),
    ),
    Defect(
        "budget",
        "the budget is compared without the block that is asked for",
        "libvmm/src/pool.c",
        replaces(
            "return held > pool->max_bytes - bytes ? held - (pool->max_bytes - bytes) : 0;",
            "return held > pool->max_bytes ? held - pool->max_bytes : 0;",
        ),
        C.format("test_budget"),
    ),
    Defect(
        "own-spare",
        "where memory is short, growth takes its own spare blocks whole",
        "libvmm/src/tensor.c",
        replaces(
            "            pool_empty_queue(tensor->pool, tensor->driver_calls, stream);\n",
            "            continue;\n",
        ),
        C.format("test_auto_pressure"),
    ),
    Defect(
        "taken-over",
        "a closed tensor's range is taken over while the device may still touch it",
        "libvmm/src/queue.c",
        replaces("(bare || entry->epoch < fences) &&", "(bare || fences + 1) &&"),
        C.format("test_recycle"),
    ),
    Defect(
        "not-given-up",
        "recycled memory stays when the budget has no room",
        "libvmm/src/queue.c",
        replaces(
            "picks[] = {PICK_AHEAD, PICK_RETIRED, PICK_ALL};",
            "picks[] = {PICK_AHEAD, PICK_AHEAD, PICK_AHEAD};",
        ),
        C.format("test_recycle"),
    ),
    Defect(
        "ahead-budget",
        "look-ahead does not ask the budget",
        "libvmm/src/pool.c",
        replaces(
            "    if (over_budget(work->pool, bytes))\n        return VMM_ERR_OUT_OF_MEMORY;\n", ""
        ),
        C.format("test_lookahead"),
    ),
    Defect(
        "ahead-forget",
        "look-ahead maps for a tensor that has been closed since it was looked at",
        "libvmm/src/pool.c",
        replaces("    lookahead_forget_locked(pool, entry);\n", ""),
        C.format("test_lookahead"),
    ),
    Defect(
        "ahead-revived",
        "a failed launch leaves blocks that were mapped ahead in use",
        "libvmm/src/range.c",
        replaces("    make_spare(range, lane, mark->n_live);\n", ""),
        C.format("test_lookahead"),
    ),
    Defect(
        "not-ready",
        "an access call that is not ready is not tried again",
        "libvmm/src/driver_gpu.h",
        replaces("i < SET_ACCESS_ATTEMPTS; i++", "i < 0; i++"),
        C.format("test_undo"),
    ),
    Defect(
        "zero",
        "rows of a tensor with zero=True are not filled",
        "libvmm/src/tensor.c",
        replaces(
            "if (!status && tensor->spec.zero)\n", "if (!status && tensor->spec.zero && false)\n"
        ),
        C.format("test_zero"),
    ),
    Defect(
        "pins",
        "rows under an export can be truncated away",
        "libvmm/src/pin.c",
        replaces("bool allowed = *pinned <= n_rows;", "bool allowed = true;"),
        C.format("test_pins"),
    ),
    # ---- lanes, cursors and graphs --------------------------------------------------------
    Defect(
        "longest",
        "the length of a ragged tensor is that of its shortest lane",
        "libvmm/src/lanes.c",
        replaces(
            "    tensor_set_length(tensor, most);\n", "    tensor_set_length(tensor, least);\n"
        ),
        C.format("test_ragged"),
    ),
    Defect(
        "cursor",
        "an append does not move the cursor",
        "libvmm/src/append.c",
        replaces(
            "    else if (!status && has_cursor)\n",
            "    else if (!status && has_cursor && false)\n",
        ),
        C.format("test_graphs"),
    ),
    Defect(
        "cursor-mapped",
        "the device is not told what has been mapped since",
        "libvmm/src/cursor.c",
        replaces("cursor->shown_mapped == n_rows)\n", "true || n_rows)\n"),
        C.format("test_graphs"),
    ),
    Defect(
        "graph-rows",
        "rows that a graph has appended, and the host does not count, are written over",
        "libvmm/src/append.c",
        replaces("    if (!status && may_differ)\n", "    if (!status && may_differ && false)\n"),
        C.format("test_graphs"),
    ),
    Defect(
        "cursor-unmapped",
        "the device is not told that rows it could not be told of are gone",
        "libvmm/src/tensor.c",
        replaces(
            "        cursor_show_mapped(growths[i].tensor, growths[i].n_rows_before);",
            "        (void)growths;",
        ),
        C.format("test_cursor"),
    ),
    Defect(
        "graph-gone",
        "a graph that is gone still counts",
        "libvmm/src/graph_pins.c",
        replaces(
            "    __atomic_sub_fetch(&held->tensor->cursor->graphs, 1, __ATOMIC_RELEASE);\n", ""
        ),
        C.format("test_graphs"),
    ),
    Defect(
        "graph-pins-rows",
        "a graph pins what arrays showed that are gone",
        "libvmm/src/graph_pins.c",
        replaces("vmm_pin_cursor(tensor, &held->pin)", "vmm_pin_rows(tensor, 0, &held->pin)"),
        C.format("test_graphs"),
    ),
    Defect(
        "no-keeper",
        "a graph keeps its tensors itself, though someone has asked for them",
        "libvmm/src/graph_pins.c",
        replaces(
            "        pins = pins->next;\n    if (pins) {", "        pins = NULL;\n    if (pins) {"
        ),
        C.format("test_graphs"),
    ),
    Defect(
        "other-keeper",
        "the tensors of a graph are given to who keeps those of another",
        "libvmm/src/graph_pins.c",
        replaces("    while (pins && pins->capture != capture)\n", "    while (false)\n"),
        C.format("test_graphs"),
    ),
    Defect(
        "keeper-drops",
        "who was given a graph's tensors does not keep them",
        "libvmm/src/graph_pins.c",
        replaces(
            "        held->next = pins->first;\n        pins->first = held;\n",
            "        drop(held);\n",
        ),
        C.format("test_graphs"),
    ),
    Defect(
        "keepers-before",
        "whoever asks to keep a graph's tensors replaces those who have asked before",
        "libvmm/src/graph_pins.c",
        replaces("    pins->next = device->graph_pins;\n", ""),
        C.format("test_graphs"),
    ),
    Defect(
        "keeper-gone",
        "who keeps a graph's tensors is still asked when it is gone",
        "libvmm/src/graph_pins.c",
        replaces("    *link = pins->next;\n", ""),
        C.format("test_graphs"),
    ),
    Defect(
        "stale-cursor",
        "a cursor that could not be set is set anew over what a replay has appended since",
        "libvmm/src/cursor.c",
        replaces(
            "if (!cursor || !cursor->may_differ)\n            continue;",
            "if (!cursor || !cursor->may_differ || cursor->stale)\n            continue;",
        ),
        C.format("test_stale"),
    ),
    Defect(
        "stale-order",
        "a cursor is set anew beside what a truncation that failed has launched elsewhere",
        "libvmm/src/cursor.c",
        replaces(
            "    if (status != VMM_ERR_CAPTURING && on_device(tensor))\n",
            "    if (!status && on_device(tensor))\n",
        ),
        C.format("test_stale"),
    ),
    Defect(
        "overflow",
        "advance() does not see that a replay came to the end of what is mapped",
        "libvmm/src/cursor.c",
        replaces("if (__atomic_load_n(cursor->control->flag, __ATOMIC_ACQUIRE)) {", "if (false) {"),
        C.format("test_graphs"),
    ),
    Defect(
        "control-fence",
        "a control block is another tensor's before its fence",
        "libvmm/src/control.c",
        replaces(
            "    pool_discard_later(control->pool, &control->entry, discard_control);\n",
            "    vmm_pool *pool = control->pool;\n"
            "    pthread_mutex_lock(&pool->lock);\n"
            "    discard_control(&control->entry);\n"
            "    pthread_mutex_unlock(&pool->lock);\n",
        ),
        C.format("test_cursor"),
    ),
    Defect(
        "control-word",
        "what a control block is told is gone before it is copied",
        "libvmm/src/cursor.c",
        replaces(
            "    uint32_t *word = (uint32_t *)(cursor->control->mirror + at);\n",
            "    uint32_t here, *word = &here;\n",
        ),
        C.format("test_cursor"),
    ),
    # ---- order -----------------------------------------------------------------------------
    Defect(
        "last-write",
        "an append does not wait for the one before on another stream",
        "libvmm/src/order.c",
        replaces(
            "    vmm_status status = wait_for_last_write(tensor, stream);\n"
            "    return status ? status : wait_for_readers(tensor, stream);\n",
            "    return wait_for_readers(tensor, stream);\n",
        ),
        C.format("test_streams"),
    ),
    Defect(
        "readers",
        "an append does not wait for the stream that truncate() was given",
        "libvmm/src/order.c",
        replaces(
            "    return status ? status : wait_for_readers(tensor, stream);\n",
            "    return status;\n",
        ),
        C.format("test_streams"),
    ),
    Defect(
        "stale-event",
        "an append leaves the hand-off's event as it was",
        "libvmm/src/order.c",
        replaces(
            "    tensor->last_stream = stream;\n    tensor->event_current = false;\n",
            "    tensor->last_stream = stream;\n",
        ),
        C.format("test_streams"),
    ),
    Defect(
        "staging",
        "the copy of a strided source is freed while the device reads it",
        "libvmm/src/copy.c",
        replaces(
            "vmm_status waited = DRIVER(pool, tensor_calls, stream_synchronize, stream);",
            "vmm_status waited = VMM_OK;\n    (void)stream;",
        ),
        C.format("test_strided"),
    ),
    # ---- captures, contexts -----------------------------------------------------------------
    Defect(
        "capture-of-many",
        "a fence is taken while the stream of another tensor of the call is captured",
        "libvmm/src/tensor.c",
        replaces("            stream = other;\n", "            (void)other;\n"),
        C.format("test_capture_fences"),
    ),
    Defect(
        "capture-mode",
        "the caller's capture mode is not restored",
        "libvmm/src/driver_gpu.h",
        replaces(
            "    if (visit->is_relaxed)\n"
            "        driver.calls.GPU(ThreadExchangeStreamCaptureMode)(&visit->mode);\n",
            "",
        ),
        C.format("test_device"),
    ),
    Defect(
        "relaxed",
        "memory calls are made in the caller's capture mode",
        "libvmm/src/driver_gpu.h",
        replaces(
            "    visit->mode = GPU_CAPTURE_MODE_RELAXED;\n",
            "    visit->mode = 0; /* global */\n",
        ),
        C.format("test_streams"),
    ),
    Defect(
        "context",
        "the caller's current context is not restored",
        "libvmm/src/driver_cuda.c",
        replaces("    if (before->is_pushed)\n        driver.calls.cuCtxPopCurrent(&ours);\n", ""),
        C.format("test_device"),
    ),
    Defect(
        "capture-fence",
        "a fence is taken between capture_begin() and capture_end()",
        "libvmm/src/queue.c",
        replaces("capture = pool->device->captures;", "capture = 0;"),
        PY.format("test_pool.py::test_no_fence_between_capture_begin_and_end"),
    ),
    Defect(
        "legacy-capture",
        "a fence is taken while a blocking stream is captured, which breaks the capture",
        "libvmm/src/driver_gpu_streams.h",
        replaces(
            "    status = CALL(GPU(StreamGetCaptureInfo), stream_of(VMM_STREAM_LEGACY), "
            "&capture, NULL, NULL,\n                  NULL, NULL);\n",
            "    (void)capture;\n",
        ),
        C.format("test_capture_fences"),
    ),
    Defect(
        "own-capture",
        "a fence is taken while the append's own stream is captured",
        "libvmm/src/queue.c",
        replaces("if (!status && capture)", "if (!status && pool->device->captures)"),
        C.format("test_streams"),
    ),
    # ---- the short way of one append ----------------------------------------------------
    Defect(
        "short-stream",
        "the short way of an append asks not on which stream the last write was",
        "libvmm/src/append.c",
        replaces("           tensor->last_stream == stream && ", "           "),
        PY.format("test_streams.py"),
    ),
    Defect(
        "short-readers",
        "the short way of an append comes before readers that truncate() named",
        "libvmm/src/append.c",
        replaces("&& tensor->n_waits == 0 ", ""),
        C.format("test_streams"),
    ),
    Defect(
        "short-cursor",
        "the short way of an append leaves the cursor behind",
        "libvmm/src/append.c",
        replaces(
            "!tensor->is_ragged &&\n           !tensor->cursor;",
            "!tensor->is_ragged;",
        ),
        C.format("test_cursor"),
    ),
    Defect(
        "short-event",
        "after the short way of an append, the event of the write before stands for it",
        "libvmm/src/append.c",
        replaces(
            "        order_after_write(tensor, stream);\n        tensor_set_length(tensor, "
            "tensor->length + n_rows);",
            "        tensor_set_length(tensor, tensor->length + n_rows);",
        ),
        PY.format("test_streams.py"),
    ),
    Defect(
        "short-capture",
        "the short way of an append takes a stream that is captured for one that is not",
        "libvmm/src/append.c",
        replaces("    if (captured)\n        return false;", ""),
        PY.format("test_captures.py"),
    ),
]
