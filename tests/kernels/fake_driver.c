// A driver of two GPUs that computes nothing and counts what is done to streams and events.
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum { NAMES = 256 };
static char trace[4096];
static int failing;

static void note(const char* what, const void* a, const void* b) {
    const size_t used = strlen(trace);
    snprintf(trace + used, sizeof trace - used, "%s %p %p;", what, a, b);
}

const char* fake_trace(void) { return trace; }
void fake_reset(int fail) {
    trace[0] = 0;
    failing = fail;
}

int cuInit(unsigned flags) { return flags || failing == 1 ? 100 : 0; }
int cuDriverGetVersion(int* version) { return *version = 13020, 0; }
int cuDeviceGetCount(int* count) { return *count = failing == 2 ? 0 : 2, 0; }
int cuDeviceGet(int* device, int number) { return *device = 40 + number, 0; }
int cuDeviceGetName(char* name, int length, int device) {
    return snprintf(name, (size_t)length, "Fake %d", device), length == NAMES ? 0 : 1;
}
int cuDeviceGetAttribute(int* value, int which, int device) {
    return *value = which == 75 ? 8 + (device == 41) * 4 : which == 76 ? 6 * (device == 40) : -1, 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    return *bytes = (size_t)device << 30, 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    return *context = (void*)(0x700000000000u + (size_t)device), 0;
}
int cuCtxSetCurrent(void* context) { return note("current", context, 0), 0; }
int cuStreamCreate(void** stream, unsigned flags) {
    return *stream = failing == 3 ? 0 : (void*)0x7fff00000100u, flags == 1 ? 0 : 1;
}
int cuStreamSynchronize(void* stream) { return note("wait", stream, 0), 0; }
int cuStreamDestroy_v2(void* stream) { return note("free", stream, 0), 0; }
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
    return note("after", stream, event), (int)flags;
}
int cuEventCreate(void** event, unsigned flags) {
    return *event = (void*)0x7fff00000200u, flags == 2 ? 0 : 1;
}
int cuEventRecord(void* event, void* stream) {
    return note("record", event, stream), failing == 4 ? 700 : 0;
}
int cuEventDestroy_v2(void* event) { return note("free", event, 0), 0; }
int cuGetErrorString(int status, const char** text) {
    if (status == 700) return *text = "an illegal memory access was encountered", 0;
    return *text = 0, 1;
}
