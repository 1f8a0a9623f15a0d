/* append_twin.h - what the twins of the kernels share: the runs of a copy. */
#ifndef SIM_APPEND_TWIN_H
#define SIM_APPEND_TWIN_H

#include "cursor_job.h"
#include "sim.h"

typedef vmm_append_job_wide job;

typedef struct run {
    uint64_t index[VMM_APPEND_DIMS_WIDE];
    uint64_t dst, src;
} run;

bool sim_first_run(const job *j, run *r);
bool sim_next_run(const job *j, run *r);

/* Is the job, number `i` of its launch, one at all? */
CUresult sim_check_shape(const job *j, unsigned i, uint32_t dims);
/* Visit the runs of one side, neighbours as one. */
CUresult sim_touch_side(const job *j, const sim_visit *visit, bool write);

#endif /* SIM_APPEND_TWIN_H */
