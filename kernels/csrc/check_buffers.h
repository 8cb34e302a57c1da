// Pointers, before anything is done with them.
#ifndef QSM_CHECK_BUFFERS_H
#define QSM_CHECK_BUFFERS_H

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace qsm {

// Refuses a null or misaligned pointer.
inline Status check_pointer(const char *name, const void *pointer, size_t alignment) {
    if (!pointer) return fail(QSM_CUDA_NULL_POINTER, "%s is a null pointer", name);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return QSM_CUDA_OK;
    return fail(QSM_CUDA_MISALIGNED, "%s must be aligned to %zu bytes, got %p", name, alignment,
                pointer);
}

// A null pointer passes.
inline Status check_optional_pointer(const char *name, const void *pointer, size_t alignment) {
    return pointer ? check_pointer(name, pointer, alignment) : QSM_CUDA_OK;
}

// Refuses buffers that share a byte; null ones share nothing.
inline Status check_apart(const char *name, const void *pointer, size_t bytes,
                          const char *other_name, const void *other, size_t other_bytes) {
    const auto a = reinterpret_cast<uintptr_t>(pointer), b = reinterpret_cast<uintptr_t>(other);
    // Differences, not ends: a wrong size may reach beyond the address space.
    if (!a || !b || (a < b ? b - a >= bytes : a - b >= other_bytes)) return QSM_CUDA_OK;
    return fail(QSM_CUDA_OVERLAP, "%s and %s overlap; they must be apart", name, other_name);
}

}  // namespace qsm

#endif
