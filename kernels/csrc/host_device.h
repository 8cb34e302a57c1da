// Functions for both sides: a C++ compiler without CUDA reads these headers too, for the tests.
#ifndef QSM_HOST_DEVICE_H
#define QSM_HOST_DEVICE_H

#ifdef __CUDACC__
#define QSM_HOST_DEVICE __host__ __device__ inline
#else
#define QSM_HOST_DEVICE inline
#endif

#endif
