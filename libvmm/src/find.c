/* find.c - live tensors by their base address.
 *
 * A framework hands back memory and not the tensor that it is of. The table holds no
 * reference: a tensor is in it from when it is reserved until its last reference goes.
 */
#include "error.h"
#include "process.h"
#include "tensor.h"

#define N_BUCKETS 4096

/* Nothing is called while it is held. */
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static vmm_tensor *table[N_BUCKETS];

static void before_fork(void) {
    pthread_mutex_lock(&table_lock);
}

static void after_fork(void) {
    pthread_mutex_unlock(&table_lock);
}

/* The parent's tensors stay, so that the child is told what it has hold of. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&table_lock, NULL);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
}

static vmm_tensor **bucket_of(uintptr_t base) {
    uint64_t mixed = (base >> 12) * UINT64_C(0x9e3779b97f4a7c15);
    return &table[mixed >> 52]; /* 12 bits */
}

/* What points to the tensor at `base`, or to the NULL at the end. */
static vmm_tensor **look_up(uintptr_t base) {
    vmm_tensor **link = bucket_of(base);
    while (*link && (*link)->range->base != base)
        link = &(*link)->next_found;
    return link;
}

void find_add(vmm_tensor *tensor) {
    pthread_mutex_lock(&table_lock);
    vmm_tensor **link = look_up(tensor->range->base);
    vmm_tensor *inherited = *link; /* the memory of the parent's is not here */
    tensor->next_found = inherited ? inherited->next_found : NULL;
    *link = tensor;
    pthread_mutex_unlock(&table_lock);
}

void find_remove(vmm_tensor *tensor) {
    pthread_mutex_lock(&table_lock);
    vmm_tensor **link = look_up(tensor->range->base);
    if (*link == tensor)
        *link = tensor->next_found;
    pthread_mutex_unlock(&table_lock);
}

vmm_status vmm_find(const void *base, vmm_tensor **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "find", "out is NULL");
    pthread_mutex_lock(&table_lock);
    vmm_tensor *tensor = *look_up((uintptr_t)base);
    bool inherited = tensor && tensor->process != vmm_process;
    if (inherited || (tensor && !tensor_reference_live(tensor)))
        tensor = NULL; /* the last reference is just going */
    pthread_mutex_unlock(&table_lock);
    *out = tensor;
    if (inherited) /* unreached: by a child, which ends in _exit() */
        return vmm_fail(VMM_ERR_FORKED, "find",
                        "the tensor belongs to the parent process: its memory is not here");
    return VMM_OK;
}
