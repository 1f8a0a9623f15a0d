/* use.c - copies and fills over blocks, and over what is none. */
#include "probe.h"

#define RW CU_MEM_ACCESS_FLAGS_PROT_READWRITE
#define RO CU_MEM_ACCESS_FLAGS_PROT_READ

static unsigned char host[1 << 16];

/* Two blocks, then nothing. */
static CUdeviceptr two_blocks(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    put_block(base + granule, 1, RW);
    MUST(cuMemsetD8, base, 0, 2 * granule);
    MUST(cuCtxSynchronize);
    return base;
}

static void copy_over_a_block_boundary(void) {
    CUdeviceptr base = two_blocks(), middle = base + granule - 100;
    memset(host, 6, 200);
    TRY(cuMemcpyHtoD, middle, host, 200);
    memset(host, 0, 200);
    TRY(cuMemcpyDtoH, host, middle, 200);
    say("%s", host[0] == 6 && host[199] == 6 ? "right" : "wrong");
    TRY(cuMemcpyDtoD, base, middle, 200);
    say("%s", byte_at(base + 199) == 6 ? "right" : "wrong");
    TRY(cuMemsetD8, middle, 8, 200);
    say("%s", byte_at(middle + 199) == 8 && byte_at(middle + 200) == 0 ? "right" : "wrong");
}

static void copy_2d(const char *word, CUdeviceptr dst, size_t pitch, size_t width, size_t height) {
    CUDA_MEMCPY2D copy = {.srcMemoryType = CU_MEMORYTYPE_HOST,
                          .srcHost = host,
                          .srcPitch = width,
                          .dstMemoryType = CU_MEMORYTYPE_DEVICE,
                          .dstDevice = dst,
                          .dstPitch = pitch,
                          .WidthInBytes = width,
                          .Height = height};
    say_code(word, settled(cuda.cuMemcpy2D(&copy)));
}

static void copy_2d_over_a_block_boundary(void) {
    CUdeviceptr base = two_blocks();
    memset(host, 5, sizeof host);
    copy_2d("rows", base + granule - 1024, 512, 64, 4);
    say("%s", byte_at(base + granule + 512) == 5 && byte_at(base + granule + 64) == 0 ? "right"
                                                                                      : "wrong");
    copy_2d("within a row", base + granule - 32, 512, 64, 2);
    say("%s", byte_at(base + granule + 31) == 5 ? "right" : "wrong");
}

static void copy_2d_sizes(void) {
    CUdeviceptr base = two_blocks();
    copy_2d("no row", base, 512, 64, 0);
    copy_2d("no width", base, 512, 0, 4);
    copy_2d("a pitch below the width", base, 32, 64, 2);
    copy_2d("pitch 2^31 - 1", base, ((size_t)1 << 31) - 1, 64, 1);
    copy_2d("pitch 2^31", base, (size_t)1 << 31, 64, 1);
}

static void fill_no_bytes(void) {
    CUdeviceptr base = two_blocks();
    TRY(cuMemsetD8, base, 1, 0);
    TRY(cuMemcpyHtoD, base, host, 0);
    TRY_AS("unmapped", cuMemsetD8, base + 3 * granule, 1, 0);
}

/* ---- where there is nothing. Each in a probe of its own: one that faults loses the context. -- */
static void fill_past_the_mapping(void) {
    CUdeviceptr base = two_blocks();
    say_code("cuMemsetD8Async",
             settled(cuda.cuMemsetD8Async(base + granule, 1, 2 * granule, new_stream(0))));
}

static void fill_unmapped(void) {
    CUdeviceptr base = two_blocks();
    say_code("cuMemsetD8Async",
             settled(cuda.cuMemsetD8Async(base + 3 * granule, 1, granule, new_stream(0))));
}

static void fill_without_access(void) {
    CUdeviceptr base = new_space(1);
    put_block(base, 1, -1);
    say_code("cuMemsetD8Async", settled(cuda.cuMemsetD8Async(base, 1, 64, new_stream(0))));
}

static void fill_read_only(void) {
    CUdeviceptr base = new_space(1);
    put_block(base, 1, RO);
    say_code("cuMemsetD8Async", settled(cuda.cuMemsetD8Async(base, 1, 64, new_stream(0))));
}

static void write_past_the_mapping(void) {
    CUdeviceptr base = two_blocks();
    say_code("cuMemcpyHtoD", settled(cuda.cuMemcpyHtoD(base + 2 * granule - 8, host, 64)));
}

static void write_unmapped(void) {
    CUdeviceptr base = two_blocks();
    say_code("cuMemcpyHtoD", settled(cuda.cuMemcpyHtoD(base + 3 * granule, host, 64)));
}

static void write_without_access(void) {
    CUdeviceptr base = new_space(1);
    put_block(base, 1, -1);
    say_code("cuMemcpyHtoD", settled(cuda.cuMemcpyHtoD(base, host, 64)));
}

static void write_read_only(void) {
    CUdeviceptr base = new_space(1);
    put_block(base, 1, RO);
    say_code("cuMemcpyHtoD", settled(cuda.cuMemcpyHtoD(base, host, 64)));
}

static void read_unmapped(void) {
    CUdeviceptr base = two_blocks();
    say_code("cuMemcpyDtoH", settled(cuda.cuMemcpyDtoH(host, base + 3 * granule, 64)));
}

static void read_past_the_mapping(void) {
    CUdeviceptr base = two_blocks();
    say_code("cuMemcpyDtoH", settled(cuda.cuMemcpyDtoH(host, base + 2 * granule - 8, 64)));
}

static void read_without_access(void) {
    CUdeviceptr base = new_space(1);
    put_block(base, 1, -1);
    say_code("cuMemcpyDtoH", settled(cuda.cuMemcpyDtoH(host, base, 64)));
}

static void copy_from_the_unmapped(void) {
    CUdeviceptr base = two_blocks();
    say_code("cuMemcpyDtoDAsync",
             settled(cuda.cuMemcpyDtoDAsync(base, base + 3 * granule, 64, new_stream(0))));
}

static void copy_2d_into_the_unmapped(void) {
    CUdeviceptr base = two_blocks();
    copy_2d("cuMemcpy2D", base + 2 * granule - 512, 512, 64, 2);
}

static void write_to_nowhere(void) {
    say_code("cuMemcpyHtoD", settled(cuda.cuMemcpyHtoD(16, host, 64)));
}

static void use_after_unmap(void) {
    CUdeviceptr base = two_blocks();
    MUST(cuMemUnmap, base, 2 * granule);
    say_code("cuMemsetD8Async", settled(cuda.cuMemsetD8Async(base, 1, 64, new_stream(0))));
}

static void graph_over_what_was_unmapped(void) {
    CUdeviceptr base = two_blocks();
    CUstream stream = new_stream(CU_STREAM_NON_BLOCKING);
    CUgraph graph;
    CUgraphExec exec;
    MUST(cuStreamBeginCapture, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    MUST(cuMemsetD8Async, base, 1, 64, stream);
    MUST(cuStreamEndCapture, stream, &graph);
    MUST(cuGraphInstantiateWithFlags, &exec, graph, 0);
    MUST(cuMemUnmap, base, 2 * granule);
    say_code("cuGraphLaunch", settled(cuda.cuGraphLaunch(exec, stream)));
}

static const probe probes[] = {
    PROBE(copy_over_a_block_boundary),
    PROBE(copy_2d_over_a_block_boundary),
    PROBE(copy_2d_sizes),
    PROBE(fill_no_bytes),
    PROBE(fill_past_the_mapping),
    PROBE(fill_unmapped),
    PROBE(fill_without_access),
    PROBE(fill_read_only),
    PROBE(write_past_the_mapping),
    PROBE(write_unmapped),
    PROBE(write_without_access),
    PROBE(write_read_only),
    PROBE(write_to_nowhere),
    PROBE(read_unmapped),
    PROBE(read_past_the_mapping),
    PROBE(read_without_access),
    PROBE(copy_from_the_unmapped),
    PROBE(copy_2d_into_the_unmapped),
    PROBE(use_after_unmap),
    PROBE(graph_over_what_was_unmapped),
};
const probe_list use_probes = {"use", probes, LENGTH_OF(probes)};
