/* vmm_sim.h - what tests ask of the simulated CUDA driver beyond CUDA's own calls.
 *
 * The functions are exported by build/sim/libcuda.so.1 and found by dlsym or ctypes; a
 * library without vmm_sim_version() is not the simulator. Call names are those of
 * cuGetProcAddress, without a version suffix ("cuMemAlloc"). build/sim/libamdhip64.so is the
 * same under HIP's names: calls are counted, failed and reported as "hipMalloc", and CUDA's
 * name of a call is understood, too. Every function may be called
 * from any thread, before cuInit too, and none counts as a driver call.
 *
 * Environment, read when the library is loaded:
 *   VMM_SIM_DEVICES         how many devices there are (1, at most 8; 0: cuInit refuses)
 *   VMM_SIM_MEMORY          bytes of memory of each device (4 GiB)
 *   VMM_SIM_GRANULARITY     of physical blocks, a power of two >= 4096 (2 MiB)
 *   VMM_SIM_DRIVER_VERSION  what cuDriverGetVersion says (13000); newer entry points are absent.
 *                           hipRuntimeGetVersion: 60342134
 *   VMM_SIM_LACKS           a call that cuGetProcAddress does not find ("cuMemMap"), or "vmm":
 *                           devices without virtual memory management
 *   VMM_SIM_SEED            of the delays (1)
 *   VMM_SIM_DELAY_US        every piece of device work is late by 0 to this many microseconds;
 *                           not set: one in eight by up to 20; 0: none
 *   VMM_SIM_STRICT          "abort" (default) or "return": return what the real driver would
 *   VMM_SIM_OBSERVE         1 (default): work counts as finished only once the host has seen it
 *                           by an event, a synchronise or a query; 0: once it has run
 *   VMM_SIM_RACES           1 (default): unordered accesses of two streams to the same bytes
 *                           are reported; 0: not looked for
 *   VMM_SIM_JUNK            1 (default): new memory is filled with 0xA5; 0: it is left zero
 *   VMM_SIM_FAIL            "call:nth:code[:times]", several separated by commas
 *   VMM_SIM_CHECK_EXIT      1: at exit, list VMM handles, mappings and reservations that are
 *                           still alive and exit with status 1 if there are any
 *
 * Strictness: a misuse prints "vmm-sim: <call>: <what>" and aborts; device work that went
 * wrong prints "vmm-sim: late work: <what>". What a program may well ask to find out (a device
 * that is not there, the attributes of a host pointer, an unknown symbol or kernel) is
 * answered with CUDA's error and no report; so is running out of memory.
 *
 * Every call that manages memory, loads code, copies at once, queries or waits counts as
 * unsafe while a stream is being captured, see cuThreadExchangeStreamCaptureMode.
 *
 * tests/conformance compares what it answers with real drivers. Where these allow what their
 * manual prohibits or leaves open (virtual memory calls in a capture, unmapping what is not
 * mapped), it is reported as a misuse and, under "return", done as they do it.
 *
 * Not modelled: contexts other than the primary ones, peer access switches and copies between
 * devices, arrays and textures, memory pools (cuMemAllocAsync), managed and registered host
 * memory, streams per thread by cuGetProcAddress's flag (CU_STREAM_PER_THREAD itself is),
 * graphs built by hand, branches of a graph running side by side, kernels other
 * than those of libvmm, real timing.
 */
#ifndef VMM_SIM_H
#define VMM_SIM_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 1 for the interface of this header. */
int vmm_sim_version(void);

/* Let the `nth` (1 is the next), and `times - 1` more after it, of the calls named `call`
 * return `code` and do nothing. `times` < 0: all that follow. "*" means every call but those
 * that code has to rely on when it leaves things as it found them: cuGetErrorName,
 * cuGetErrorString, cuCtxGetCurrent, cuCtxSetCurrent, cuCtxPushCurrent, cuCtxPopCurrent and
 * cuThreadExchangeStreamCaptureMode, which fail by name only. hipGetStreamDeviceId has no status
 * and never fails. Rules add up; each counts its own calls from now on. Returns 0, or -1 for an
 * unknown name or when 32 rules are in force. */
int vmm_sim_fail(const char *call, long nth, int code, int times);
/* How many calls the rules have failed since the last reset. */
long vmm_sim_failed(void);
/* The first of the calls that rules for "*" have failed since the last reset, NULL for none. */
const char *vmm_sim_failed_call(void);
/* Take every rule back; the counters stay. */
void vmm_sim_fail_none(void);

/* Counters to zero, rules and reports gone, a poisoned context healed. Objects stay. */
void vmm_sim_reset(void);

/* Calls of that name since the last reset, or of all names for "*"; -1: no such call. */
long vmm_sim_calls(const char *name);
/* The i-th call name, NULL past the end. */
const char *vmm_sim_call_name(size_t i);

/* What is alive: unreleased VMM handles, VMM mappings, VMM reservations, and bytes of device
 * memory in use (cuMemAlloc's too). Any pointer may be NULL. */
void vmm_sim_live(long *handles, long *mappings, long *reservations, unsigned long long *bytes);
/* Undestroyed streams and events, blocks of cuMemAlloc, blocks of pinned host memory. */
void vmm_sim_live_objects(long *streams, long *events, long *allocations, long *host_allocations);

/* Wait until every stream has run what it was given. Not an observation: see VMM_SIM_OBSERVE. */
void vmm_sim_quiesce(void);
/* Keep all device work back: what is submitted stays pending until vmm_sim_go(). */
void vmm_sim_hold(void);
void vmm_sim_go(void);
/* Pieces of device work that have not finished. */
long vmm_sim_pending(void);

/* Under VMM_SIM_STRICT=return: reports since the last reset, and the last one's text, "" for
 * none (valid until the next report). The mode can be changed at run time: 1 aborts. */
long vmm_sim_reports(void);
const char *vmm_sim_last_report(void);
void vmm_sim_strict(int aborts);

#ifdef __cplusplus
}
#endif

#endif /* VMM_SIM_H */
