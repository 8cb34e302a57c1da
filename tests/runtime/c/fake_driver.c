/* NVIDIA's driver as far as the library calls it, with host memory for a GPU's. */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };

static int allocations_left = -1; /* until one fails; -1: none does */
static int living;
static void *current;

void fake_fail_after(int allocations) { allocations_left = allocations; }
int fake_living(void) { return living; }

int cuInit(unsigned flags) {
    (void)flags;
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = !getenv("FAKE_DRIVER_FINDS_NO_GPU");
    return SUCCESS;
}

int cuMemAlloc_v2(unsigned long long *pointer, size_t bytes) {
    void *memory = NULL;
    if (allocations_left == 0) return OUT_OF_MEMORY;
    if (allocations_left > 0) --allocations_left;
    if (posix_memalign(&memory, 256, bytes)) return OUT_OF_MEMORY;
    memset(memory, 0xff, bytes); /* NaN */
    *pointer = (unsigned long long)(size_t)memory;
    ++living;
    return SUCCESS;
}

int cuMemFree_v2(unsigned long long pointer) {
    free((void *)(size_t)pointer);
    --living;
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *stream) {
    (void)stream;
    return memcpy((void *)(size_t)to, from, bytes) ? SUCCESS : INVALID_VALUE;
}

int cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *stream) {
    (void)stream;
    return memcpy(to, (void *)(size_t)from, bytes) ? SUCCESS : INVALID_VALUE;
}

int cuMemsetD8Async(unsigned long long to, unsigned char value, size_t bytes, void *stream) {
    (void)stream;
    return memset((void *)(size_t)to, value, bytes) ? SUCCESS : INVALID_VALUE;
}

int cuStreamSynchronize(void *stream) {
    (void)stream;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    *free_bytes = *total = (size_t)1 << 30;
    return SUCCESS;
}

int cuCtxGetCurrent(void **context) {
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    current = context;
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "another error";
    return SUCCESS;
}
