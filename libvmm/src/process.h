/* process.h - which process are we? Objects carry the number of the process that made
 * them, so that a forked child, which shares none of their memory, can refuse them. */
#ifndef VMM_PROCESS_H
#define VMM_PROCESS_H

#include <stdint.h>

/* Changes in a forked child; read on every call, so it is a variable and no function. */
extern uint64_t vmm_process;

#endif /* VMM_PROCESS_H */
