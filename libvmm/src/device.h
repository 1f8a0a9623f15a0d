/* device.h - what the layers above need of an open device. */
#ifndef VMM_DEVICE_H
#define VMM_DEVICE_H

#include "driver.h"

vmm_device *vmm_device_retain(vmm_device *device);

/* Pools that were released while something of theirs was still in use: a stack that
 * any later call on a pool of the device empties. */
void vmm_device_abandon(vmm_device *device, struct vmm_pool *pool);
bool vmm_device_has_abandoned(vmm_device *device);
/* Take the whole stack, NULL if there is none. */
struct vmm_pool *vmm_device_take_abandoned(vmm_device *device);

#endif /* VMM_DEVICE_H */
