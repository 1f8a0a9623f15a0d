/* Objects keep what they need: the order of closing does not matter. A pin cannot be made on
 * rows that are being truncated. */
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>

#include "check.h"

static void test_event_outlives_the_opening(const char *name) {
    vmm_device *device;
    vmm_event *event;
    int done = 0;

    CHECK_OK(vmm_device_open(name, &device));
    CHECK_OK(vmm_event_record(device, VMM_STREAM_LEGACY, &event));
    vmm_device_close(device);
    while (!done)
        CHECK_OK(vmm_event_query(event, &done));
    vmm_event_close(event);
}

typedef struct race {
    vmm_tensor *tensor;
    int stop;
} race;

static void *pin_and_unpin(void *argument) {
    race *race = argument;
    vmm_pin *pin;

    while (!__atomic_load_n(&race->stop, __ATOMIC_ACQUIRE))
        if (vmm_pin_rows(race->tensor, 10, &pin) == VMM_OK)
            vmm_unpin(pin);
    return NULL;
}

static void test_pins_against_truncation(const char *name) {
    vmm_device *device;
    vmm_pool *pool;
    int64_t shape[] = {0, 4};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_FLOAT32, .capacity = 100};
    race race = {0};
    pthread_t thread;

    CHECK_OK(vmm_device_open(name, &device));
    CHECK_OK(vmm_pool_create(device, 0, 0, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &race.tensor));
    CHECK_OK(vmm_grow(race.tensor, 10, NULL));
    CHECK(pthread_create(&thread, NULL, pin_and_unpin, &race) == 0);
    for (int i = 0; i < 200000; i++) {
        if (vmm_truncate(race.tensor, 0, VMM_STREAM_NONE) != VMM_OK)
            continue;
        CHECK_SIZE(vmm_pinned_rows(race.tensor), 0);
        CHECK_OK(vmm_grow(race.tensor, 10, NULL));
    }
    __atomic_store_n(&race.stop, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    CHECK_OK(vmm_close(race.tensor));
    CHECK_OK(vmm_pool_close(pool));
    vmm_device_close(device);
}

/* The host's memory goes back from a process that has all its memory locked, too. */
static void test_locked_memory(const char *name) {
    fixture f = fixture_open(2, (char *[]){"", (char *)name}, 0, 0);
    int64_t shape[] = {0, 4096};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 100};
    vmm_pool_stats stats;
    vmm_tensor *tensor;

    if (mlockall(MCL_CURRENT | MCL_FUTURE)) {
        printf("this process may not lock its memory\n");
    } else {
        CHECK_OK(vmm_reserve(f.pool, &spec, &tensor));
        CHECK_OK(vmm_grow(tensor, 50, NULL));
        CHECK_OK(vmm_truncate(tensor, 1, VMM_STREAM_NONE));
        CHECK_OK(vmm_trim(tensor));
        CHECK_SIZE(vmm_mapped(tensor), 1);
        CHECK_OK(vmm_pool_statistics(f.pool, &stats));
        CHECK_SIZE(stats.parked_bytes, 0);
        CHECK_OK(vmm_grow(tensor, 50, NULL));
        CHECK_OK(vmm_close(tensor));
        CHECK_SIZE(held_bytes(f.pool), 0);
        munlockall();
    }
    fixture_close(&f);
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "host";

    mallopt(M_PERTURB, 0xA5); /* what has been freed is no longer what it was */
    test_event_outlives_the_opening(name);
    test_pins_against_truncation(name);
    if (strcmp(name, "host") == 0)
        test_locked_memory(name);
    return 0;
}
