/* A tensor is found by its address as long as it lives, with or without its owner, and never
 * kept alive by being findable (invariant 10). */
#include "check.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static const int64_t shape[] = {0, 1024};
static const vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 1000};

static vmm_tensor *found_at(const void *base) {
    vmm_tensor *tensor;
    CHECK_OK(vmm_find(base, &tensor));
    return tensor;
}

static void test_lifetime(const fixture *f) {
    vmm_tensor *tensor, *other;
    vmm_pin *pin;

    CHECK(!found_at(NULL));
    CHECK_STATUS(vmm_find(NULL, NULL), VMM_ERR_INVALID);
    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    CHECK_OK(vmm_reserve(f->pool, &spec, &other));
    char *base = vmm_base(tensor);
    CHECK(found_at(base) == tensor);
    CHECK_SIZE(vmm_pin_count(tensor), 1);
    CHECK_STATUS(vmm_close(tensor), VMM_ERR_PINNED);
    vmm_release(tensor); /* what was found */
    CHECK_SIZE(vmm_pin_count(tensor), 0);
    CHECK(!found_at(base + 1));
    CHECK(!found_at(base + 4096));
    CHECK(found_at(vmm_base(other)) == other);
    vmm_release(other);

    /* Its owner goes, and a pin stays: it lives, grows, and goes with the pin. */
    CHECK_OK(vmm_grow(tensor, 10, NULL));
    CHECK_OK(vmm_pin_rows(tensor, 10, &pin));
    vmm_release(tensor);
    CHECK(found_at(base) == tensor);
    CHECK_OK(vmm_grow(tensor, 10, NULL));
    CHECK_SIZE(vmm_length(tensor), 20);
    vmm_unpin(pin);
    CHECK(found_at(base) == tensor); /* by the reference from before */
    vmm_release(tensor);
    vmm_release(tensor);
    CHECK(!found_at(base));
    CHECK_OK(vmm_close(other));
}

static void test_what_it_is(const fixture *f) {
    vmm_tensor *tensor;
    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    CHECK(vmm_pool_of(tensor) == f->pool);
    CHECK(vmm_device_of(tensor) == f->device);
    CHECK(vmm_spec_of(tensor)->capacity == 1000 && vmm_spec_of(tensor)->shape[1] == 1024);
    CHECK(!vmm_user(tensor)[0] && !vmm_user(tensor)[1]);
    CHECK(!vmm_last_stream(tensor));
    vmm_user(tensor)[1] = tensor;
    CHECK(vmm_user(tensor)[1] == tensor);
    CHECK_OK(vmm_close(tensor));
}

/* Rows shown by what was cut from an export are pinned by any export, while there is one. */
static void test_shown_rows(const fixture *f) {
    vmm_tensor *tensor;
    vmm_pin *first, *second;

    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, 10, NULL));
    CHECK_OK(vmm_pin_rows(tensor, 0, &first));
    vmm_pin_shown(tensor);
    CHECK_OK(vmm_grow(tensor, 5, NULL));
    CHECK_SIZE(vmm_pinned_rows(tensor), 10);
    CHECK_STATUS(vmm_truncate(tensor, 9, VMM_STREAM_NONE), VMM_ERR_PINNED);
    CHECK_OK(vmm_truncate(tensor, 10, VMM_STREAM_NONE));
    CHECK_OK(vmm_pin_rows(tensor, 0, &second));
    vmm_unpin(first);
    CHECK_STATUS(vmm_truncate(tensor, 9, VMM_STREAM_NONE), VMM_ERR_PINNED);
    vmm_unpin(second);
    CHECK_OK(vmm_pin_rows(tensor, 0, &first));
    CHECK_OK(vmm_truncate(tensor, 0, VMM_STREAM_NONE));
    vmm_unpin(first);
    CHECK_OK(vmm_close(tensor));
}

typedef struct seeker {
    void *base; /* atomic */
    bool stop;
    size_t n_found;
} seeker;

static void *seek(void *argument) {
    seeker *s = argument;
    while (!__atomic_load_n(&s->stop, __ATOMIC_ACQUIRE)) {
        vmm_tensor *tensor = found_at(__atomic_load_n(&s->base, __ATOMIC_ACQUIRE));
        if (!tensor)
            continue;
        s->n_found++;
        CHECK_SIZE(vmm_capacity(tensor), 1000);
        vmm_release(tensor);
    }
    return NULL;
}

/* Found while the last reference goes, and while the address becomes another's. */
static void test_against_the_end(const fixture *f) {
    seeker s = {0};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, seek, &s) == 0);
    for (int i = 0; i < 20000 || s.n_found == 0; i++) {
        vmm_tensor *tensor;
        CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
        __atomic_store_n(&s.base, vmm_base(tensor), __ATOMIC_RELEASE);
        vmm_release(tensor);
    }
    __atomic_store_n(&s.stop, true, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
}

static void test_forked_child(const fixture *f) {
    vmm_tensor *tensor;
    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        vmm_device *device;
        vmm_pool *pool;
        vmm_tensor *found, *own;
        CHECK_STATUS(vmm_find(vmm_base(tensor), &found), VMM_ERR_FORKED);
        CHECK(!found);
        /* Its own tensors may get the parent's addresses, and are found. */
        CHECK_OK(vmm_device_open("host", &device));
        CHECK_OK(vmm_pool_create(device, 0, 0, &pool));
        CHECK_OK(vmm_reserve(pool, &spec, &own));
        CHECK(found_at(vmm_base(own)) == own);
        vmm_release(own);
        CHECK_OK(vmm_close(own));
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(found_at(vmm_base(tensor)) == tensor);
    vmm_release(tensor);
    CHECK_OK(vmm_close(tensor));
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);
    test_lifetime(&f);
    test_what_it_is(&f);
    test_shown_rows(&f);
    test_against_the_end(&f);
    test_forked_child(&f);
    fixture_close(&f);
    return 0;
}
