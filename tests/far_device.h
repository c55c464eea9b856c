/* The cpu backend behind a device with memory of its own: what a GPU asks of the engines, on any machine. */
#ifndef RT_TESTS_FAR_DEVICE_H
#define RT_TESTS_FAR_DEVICE_H

#include "core/backend.h"

/* A table that borrows the cpu's operations. memory: what it says it has. Copied by value; the device must outlive nothing of it. */
struct rt_backend far_backend(void);
/* What be->memory of far devices answers from now on. */
void far_memory(uint64_t bytes);

#endif
