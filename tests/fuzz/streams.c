/* streams.c - streams, events, devices; calls with nothing at all. */
#include "fuzz.h"

void do_handoff(void) {
    shadow *s = any_tensor();
    if (!s)
        return;
    vmm_stream stream = any_stream(); /* it reads what it was made to wait for */
    TRY(BIT(VMM_OK), vmm_handoff(s->tensor, stream));
    TRY(BIT(VMM_OK), vmm_add_reader(s->tensor, stream));
}

void do_stream_wait(void) {
    vmm_stream waiter = any_stream(), producer = any_stream();
    if (waiter != VMM_STREAM_NONE && producer != VMM_STREAM_NONE)
        TRY(BIT(VMM_OK), vmm_stream_wait(w.f.device, waiter, producer));
}

void do_event(void) {
    vmm_stream stream = any_stream();
    vmm_event *event;
    int done = -1;

    if (next() & 1 && w.n_events < MAX_EVENTS && stream != VMM_STREAM_NONE) {
        vmm_status status = TRY(BIT(VMM_OK), vmm_event_record(w.f.device, stream, &event));
        CHECK(!status == (event != NULL));
        if (!status)
            w.events[w.n_events++] = event;
    } else if (w.n_events) {
        size_t i = next() % w.n_events;
        vmm_status status = TRY(BIT(VMM_OK), vmm_event_query(w.events[i], &done));
        CHECK(status ? done == -1 : done == 0 || done == 1);
        if (next() & 1) {
            vmm_event_close(w.events[i]);
            w.events[i] = w.events[--w.n_events];
        }
    }
}

/* ---- devices, nothing at all --------------------------------------------------------------- */

void do_device(void) {
    char name[8] = "cuda:0";
    vmm_device *device;
    vmm_device_info info;

    /* Without a failure: addresses that the driver will not take back are lost. */
    CHECK_OK(vmm_device_query(w.f.device, &info));
    for (size_t i = 0; i < sizeof name - 1; i++) {
        uint8_t byte = next();
        if (byte)
            name[i] = (char)byte;
    }
    vmm_status status = vmm_device_open(next() & 1 ? name : w.f.name, &device);
    CHECK(!status == (device != NULL));
    vmm_device_close(device);
}

void do_nothing(void) {
    vmm_pin *pin;
    vmm_event *event;
    vmm_tensor *tensor;
    vmm_pool *pool;
    int done;
    shadow *s = any_tensor();
    vmm_tensor *t = s ? s->tensor : NULL;
    vmm_pool *p = w.pools[0].pool;
    vmm_status status = VMM_ERR_INVALID;

    switch (next() % 16) {
    case 0: status = vmm_map(NULL, 1); break;
    case 1: status = vmm_grow(NULL, 1, NULL); break;
    case 2: status = vmm_append(t, NULL, NULL); break;
    case 3: status = vmm_append_many(1, NULL, NULL, NULL); break;
    case 4: status = vmm_truncate(NULL, 0, NULL); break;
    case 5: status = vmm_trim(NULL); break;
    case 6: status = vmm_fork(t, 0, NULL); break;
    case 7: status = vmm_fork(NULL, 0, &tensor); break;
    case 8: status = vmm_pin_rows(NULL, 0, &pin); break;
    case 9: status = vmm_handoff(NULL, NULL); break;
    case 10: status = vmm_event_record(NULL, NULL, &event); break;
    case 11: status = vmm_event_query(NULL, &done); break;
    case 12: status = vmm_pool_create(NULL, 0, 0, &pool); break;
    case 13: status = vmm_reserve(p, NULL, &tensor); break;
    case 14: status = vmm_stats(t, NULL); break;
    default:
        vmm_release(NULL);
        vmm_unpin(NULL);
        vmm_event_close(NULL);
        vmm_pool_release(NULL);
        vmm_device_close(NULL);
        return;
    }
    CHECK(status == VMM_ERR_INVALID && vmm_last_error()->status == VMM_ERR_INVALID);
}

/* And of the calls that came later. */
void do_less(void) {
    shadow *s = any_tensor();
    vmm_tensor *t = s ? s->tensor : NULL;
    size_t none = 0;
    int capturing;
    int32_t *address;
    vmm_status status = VMM_ERR_INVALID;

    switch (next() % 8) {
    case 0: status = vmm_cursor(NULL, NULL, &address); break;
    case 1: status = vmm_cursor(t, NULL, NULL); break;
    case 2: status = vmm_advance(NULL, 0); break;
    case 3: status = vmm_stream_is_capturing(NULL, NULL, &capturing); break;
    case 4: status = vmm_stream_is_capturing(w.f.device, NULL, NULL); break;
    case 5: status = vmm_append_lanes(1, &t, NULL, 1, &none, NULL, NULL); break;
    case 6: status = vmm_truncate_lanes(NULL, 0, NULL, NULL, NULL); break;
    default: status = vmm_pool_set_lookahead(NULL, 1);
    }
    CHECK(status == VMM_ERR_INVALID && vmm_last_error()->status == VMM_ERR_INVALID);
}
