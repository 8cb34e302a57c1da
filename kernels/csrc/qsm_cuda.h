/* libqsm_cuda: the dipole operator of susceptibility mapping, patches and total variation, on a GPU.
 *
 * The operator is y = F^-1 [E(k) F x] with E(k) = (g(D(k)) + g(D(-k))) / 2 on the index grid,
 * D(k) = 1/3 - (k.b)^2 / |k|^2, D(0) = 0, and g one of qsm_cuda_multiplier. E(k) is computed where
 * it is applied; no kernel is stored.
 *
 *     qsm_cuda_dipole op = qsm_cuda_dipole_default();
 *     op.shape[0] = 160; op.shape[1] = 192; op.shape[2] = 160;
 *     op.voxel_size_mm[2] = 2.0;
 *     op.multiplier = QSM_CUDA_TKD;
 *     op.tkd_threshold = 0.12;
 *
 *     size_t bytes;
 *     void *workspace;
 *     if (qsm_cuda_dipole_workspace(&op, &bytes) != QSM_CUDA_OK ||
 *         cudaMalloc(&workspace, bytes) != cudaSuccess ||
 *         qsm_cuda_dipole_apply(&op, field, chi, workspace, bytes, stream) != QSM_CUDA_OK) {
 *         fprintf(stderr, "%s\n", qsm_cuda_last_error());
 *         return 1;
 *     }
 *
 * Thread safety: every function may be called from any thread at any time; calls that run at the
 * same time need workspaces of their own. qsm_cuda_last_error() is per thread.
 *
 * Device: work goes to the calling thread's current GPU, where all pointers must lie, and to the
 * caller's stream (a cudaStream_t; NULL is the default stream). Nothing waits for the GPU, except
 * that the first use of a shape makes its FFT plans and may put out older ones, which allocates,
 * frees and waits. qsm_cuda_dipole_workspace() is such a first use; call it before time counts.
 *
 * CUDA graphs: a shape must be used once before it is captured (QSM_CUDA_NOT_PREPARED otherwise),
 * and no thread may use a new one meanwhile. The plans of a captured shape stay until
 * qsm_cuda_release_plans().
 *
 * Volumes are float32, row-major (batch, x, y, z) with z fastest; those that are transformed must be
 * aligned to 8 bytes.
 */
#ifndef QSM_CUDA_H
#define QSM_CUDA_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define QSM_CUDA_API __attribute__((visibility("default")))
#else
#define QSM_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define QSM_CUDA_ABI_VERSION 4           /* changes when a struct or a signature does */
#define QSM_CUDA_WORKSPACE_ALIGNMENT 256 /* bytes; what cudaMalloc gives */
#define QSM_CUDA_CACHED_PLANS 8          /* shapes whose FFT plans are kept */
#define QSM_CUDA_DOT_WORKSPACE 526336    /* bytes that a dot product needs */

typedef enum qsm_cuda_status {
    QSM_CUDA_OK = 0,
    QSM_CUDA_NULL_POINTER = 1,
    QSM_CUDA_BAD_SHAPE = 2,       /* a size below 1, or a box outside its volume */
    QSM_CUDA_TOO_LARGE = 3,       /* more than 2^31 - 1 voxels in a call, the limit of cuFFT plans */
    QSM_CUDA_BAD_GEOMETRY = 4,    /* voxel size or B0 direction */
    QSM_CUDA_BAD_MULTIPLIER = 5,  /* unknown, or its parameter is outside its range */
    QSM_CUDA_MISALIGNED = 6,
    QSM_CUDA_OVERLAP = 7,         /* buffers that must be apart share memory */
    QSM_CUDA_SMALL_WORKSPACE = 8,
    QSM_CUDA_WRONG_MEMORY = 9,    /* a pointer that the current GPU cannot read */
    QSM_CUDA_NO_DRIVER = 10,      /* none, or too old for the CUDA this library was built with */
    QSM_CUDA_NO_GPU = 11,
    QSM_CUDA_UNSUPPORTED_GPU = 12, /* the library holds no code for this GPU */
    QSM_CUDA_NOT_PREPARED = 13,    /* a stream is captured and the plans are not made yet */
    QSM_CUDA_OUT_OF_MEMORY = 14,
    QSM_CUDA_CUDA_ERROR = 15,
    QSM_CUDA_CUFFT_ERROR = 16,
    QSM_CUDA_INTERNAL_ERROR = 17
} qsm_cuda_status;

typedef enum qsm_cuda_multiplier {
    QSM_CUDA_DIPOLE = 0,         /* D: susceptibility to field */
    QSM_CUDA_DIPOLE_SQUARED = 1, /* D^2 */
    QSM_CUDA_TKD = 2,            /* sign(D) / max(|D|, threshold); 0 where |D| < 1e-6 */
    QSM_CUDA_TIKHONOV = 3,       /* D / (D^2 + lambda) */
    QSM_CUDA_TIKHONOV_PRIOR = 4  /* lambda / (D^2 + lambda): what Tikhonov leaves of a prior map */
} qsm_cuda_multiplier;

typedef struct qsm_cuda_dipole {
    int32_t batch;           /* volumes, at least 1 */
    int32_t shape[3];        /* voxels of a volume along (x, y, z), each at least 1 */
    double voxel_size_mm[3]; /* along (x, y, z), 0.01 to 100 mm */
    double b0_direction[3];  /* in voxel axes, of any non-zero norm; its sign has no meaning */
    int32_t multiplier;      /* a qsm_cuda_multiplier */
    double tkd_threshold;    /* in (0, 2/3]; read for QSM_CUDA_TKD only */
    double tikhonov_lambda;  /* positive; read for the two of Tikhonov only */
} qsm_cuda_dipole;

/* A box of voxels in a volume. */
typedef struct qsm_cuda_patch {
    int32_t channels;  /* of the volume and of the patch, at least 1 */
    int32_t volume[3]; /* voxels of the volume along (x, y, z), each at least 1 */
    int32_t start[3];  /* the patch's first voxel in the volume, possibly outside it */
    int32_t size[3];   /* voxels of the patch, each at least 1 */
} qsm_cuda_patch;

/* A factor, times the ratio of two numbers in the GPU's memory unless both are NULL. They are read
 * when the work runs; where the denominator is 0 the coefficient is 0. */
typedef struct qsm_cuda_coefficient {
    float factor;
    const double *numerator, *denominator;
} qsm_cuda_coefficient;

/* Total variation by ADMM: x makes 1/2 |M (D x - field)|^2 + alpha |G x|_1 small, 0 outside the
 * support; G are the differences to the next voxel along each axis, over the voxel size, periodic.
 * An iteration is a split, then a solve. All buffers are volumes of the grid and must be apart. */
typedef struct qsm_cuda_tv {
    qsm_cuda_dipole grid;         /* its multiplier is not used: what is solved for is D */
    double mu1, mu3;              /* penalties of the splits of G x and of x, positive */
    double alpha;                 /* weight of the gradient, 0 or more [ppm mm] */
    const float *field;           /* [ppm]; read inside the mask only */
    const uint8_t *mask;          /* M, nonzero where the field was measured */
    const uint8_t *support;       /* nonzero where there may be sources */
    float *x;                     /* the map [ppm] */
    float *q2;                    /* field of x, and after a split the measured one inside the mask */
    float *b;                     /* right-hand side, from a split to the solve after it */
    float *s3;                    /* dual of the support, 0 in the beginning */
} qsm_cuda_tv;

/* CUDA versions as 1000 * major + 10 * minor; cuFFT's as its own CUFFT_VERSION. */
typedef struct qsm_cuda_versions {
    int32_t cuda_runtime; /* built into this library */
    int32_t cuda_driver;  /* newest CUDA that the driver supports, 0 without a driver */
    int32_t cufft;        /* the one loaded */
} qsm_cuda_versions;

/* QSM_CUDA_ABI_VERSION of the library, to compare with the header's. */
QSM_CUDA_API int32_t qsm_cuda_abi_version(void);

/* The message of the calling thread's latest failure, one line; "" before any. */
QSM_CUDA_API const char *qsm_cuda_last_error(void);

/* Fill `versions` (may be NULL), then say whether this thread's current GPU can be used. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_probe(qsm_cuda_versions *versions);

/* One 1-voxel volume of 1 mm with B0 along z, multiplier D, threshold 0.12, lambda 0.01. */
QSM_CUDA_API qsm_cuda_dipole qsm_cuda_dipole_default(void);

/* Make the plans for this shape on the current GPU; set `bytes` to what apply needs. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_dipole_workspace(const qsm_cuda_dipole *op, size_t *bytes);

/* Set `bytes` to what is enough for this batch and shape and for any that is nowhere larger; this
 * needs no GPU. It is several times what most shapes need. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_dipole_workspace_bound(const qsm_cuda_dipole *op,
                                                             size_t *bytes);

/* Enqueue y = F^-1 [E(k) F x]. `y` may be `x`; the workspace must be apart from both. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_dipole_apply(const qsm_cuda_dipole *op, const float *x,
                                                   float *y, void *workspace,
                                                   size_t workspace_bytes, void *stream);

/* The same for a geometry that lies in the GPU's memory, 3 values each, and is read there when the
 * work runs; that of `op` is not read. Where qsm_cuda_dipole_apply would refuse it, y is NaN. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_dipole_apply_device_geometry(
    const qsm_cuda_dipole *op, const float *voxel_size_mm, const float *b0_direction,
    const float *x, float *y, void *workspace, size_t workspace_bytes, void *stream);

/* Wait for the GPU and free all plans, those of captured graphs too. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_release_plans(void);

/* Enqueue patch = volume[box], (channels, size), 0 where the box lies beyond the volume. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_patch_gather(const qsm_cuda_patch *box, const float *volume,
                                                   float *patch, void *stream);

/* Enqueue total[box] += patch * window, the window being the outer product of three of size[0],
 * size[1] and size[2] weights; what lies beyond the volume is dropped. `weight` (x, y, z), unless
 * NULL, sums the windows. Patches on one stream add up in its order, so results repeat exactly. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_patch_accumulate(const qsm_cuda_patch *box,
                                                       const float *patch, const float *window_x,
                                                       const float *window_y,
                                                       const float *window_z, float *total,
                                                       float *weight, void *stream);

/* Enqueue output = (total / weight * mask)[box], (channels, size). `total` is (channels, x, y, z);
 * `weight` and `mask` (uint8, nonzero inside) are (x, y, z) or NULL: not divided, not masked.
 * Where the weight is 0 the result is 0. The box must lie inside the volume. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_patch_finish(const qsm_cuda_patch *box, const float *total,
                                                   const float *weight, const uint8_t *mask,
                                                   float *output, void *stream);

/* Enqueue y = a x + b y for vectors of `count` elements, 1 to 2^31 - 1. `y` may be `x`. With b = 0
 * what is not finite in y stays so: 0 times NaN is NaN. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_combine(int64_t count, qsm_cuda_coefficient a,
                                              const float *x, qsm_cuda_coefficient b, float *y,
                                              void *stream);

/* Enqueue *result = sum of x y, in double precision and always in the same order. `x` may be `y`;
 * the workspace has QSM_CUDA_DOT_WORKSPACE bytes. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_dot(int64_t count, const float *x, const float *y,
                                          double *result, void *workspace, void *stream);

/* Enqueue *result = how many |x| exceed a limit, with a workspace as for the dot product. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_count_beyond(int64_t count, const float *x, float limit,
                                                   double *result, void *workspace, void *stream);

/* Make the plans of a grid on the current GPU; set `bytes` to what qsm_cuda_tv_solve needs, which
 * is enough for qsm_cuda_dipole_apply too. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_tv_workspace(const qsm_cuda_dipole *grid, size_t *bytes);

/* Enqueue v = G x + s1, s1_next = clip(v, +-alpha / mu1), s3 += x outside the support, q2 = field
 * inside the mask, and b = mu1 G^T (v - 2 s1_next) + mu3 x, outside the support - mu3 s3. s1 and
 * s1_next are (3, batch, x, y, z) and take turns. The first split has s1 = 0, and alpha = 0 unless
 * the dual shall begin with the gradient of x. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_tv_split(const qsm_cuda_tv *tv, const float *s1,
                                               float *s1_next, void *stream);

/* Enqueue x = F^-1 [(F b + D F q2) / (D^2 + mu1 L + mu3)], L(k) = sum (2 - 2 cos(2 pi i / n)) / h^2,
 * and q2 = D x, in two transforms and two back. */
QSM_CUDA_API qsm_cuda_status qsm_cuda_tv_solve(const qsm_cuda_tv *tv, void *workspace,
                                               size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif
#endif
