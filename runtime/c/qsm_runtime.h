/* libqsm_runtime: from a local field to a susceptibility map, by a network that qsm-export wrote or
 * by a method that needs none. Networks that take the total field, or make a local field of it, are
 * called alike.
 *
 *     qsm_engine *engine = NULL;
 *     if (qsm_engine_open("tv-unet.onnx", NULL, &engine) != QSM_OK) {
 *         fprintf(stderr, "%s\n", qsm_last_error());
 *         return 1;
 *     }
 *     qsm_scan scan = {
 *         .local_field_ppm = field,
 *         .mask = mask,
 *         .shape = {160, 192, 160},
 *         .voxel_size_mm = {1.0, 1.0, 2.0},
 *         .b0_direction = {0.0, 0.0, 1.0},
 *     };
 *     qsm_params params = qsm_default_params();
 *     params.cancel = stop_button_pressed;
 *     if (qsm_reconstruct(engine, &scan, &params, chi_ppm) != QSM_OK) {
 *         fprintf(stderr, "%s\n", qsm_last_error());
 *     }
 *     qsm_engine_close(engine);
 *
 * qsm_engine_open_method("tv", NULL, &engine) in the place of qsm_engine_open() needs no file.
 *
 * Memory order: params.memory_order says how field, mask and map lie in memory. QSM_X_FASTEST, the
 * default, has voxel (x, y, z) at x + shape[0] * (y + shape[1] * z), as scanners, NIfTI files,
 * Fortran and MATLAB do; QSM_Z_FASTEST at z + shape[2] * (y + shape[1] * x), as numpy does. There
 * is no gap between rows or slices.
 *
 * Axes: whatever the order of storage, all is computed in one order of axes and stored back in the
 * caller's: the axis nearest to B0 becomes the third, and the three run towards right, front and
 * head where params.axes tells those ends apart. One head then gives the same map, bit for bit, in
 * all 48 storages. Without params.axes nothing is flipped.
 *
 * Thread safety: every function may be called from any thread. Calls on one engine wait for each
 * other; engines share nothing, and work at the same time. qsm_engine_close() must be the last call
 * on its engine. qsm_last_error() is per thread. Callbacks run on the thread that called the
 * library, and must not call it for the same engine.
 *
 * No C++ exception leaves the library, and it never ends the process. After any status but QSM_OK
 * the engine can be used again, and the output's contents mean nothing.
 */
#ifndef QSM_RUNTIME_H
#define QSM_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define QSM_API __attribute__((visibility("default")))
#else
#define QSM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The same numbers as the exit codes of qsm-run. */
typedef enum qsm_status {
    QSM_OK = 0,
    QSM_INTERNAL_ERROR = 1, /* a bug; please report it */
    QSM_USAGE_ERROR = 2,    /* null pointers, or parameters that contradict each other */
    QSM_DATA_ERROR = 3,     /* a missing file; values or a geometry that cannot be right */
    QSM_ENGINE_ERROR = 4,   /* a model or a device that cannot run what was asked for */
    QSM_MEMORY_ERROR = 6,   /* it does not fit the memory, not even in patches */
    QSM_CANCELLED = 130     /* params.cancel said so */
} qsm_status;

typedef enum qsm_memory_order { QSM_X_FASTEST = 0, QSM_Z_FASTEST = 1 } qsm_memory_order;

/* What becomes of the voxels that patches share. */
typedef enum qsm_blend {
    QSM_BLEND_AUTO = 0, /* as the network's receptive field asks for */
    QSM_BLEND_HANN = 1,
    QSM_BLEND_GAUSSIAN = 2,
    QSM_BLEND_CROP = 3 /* each from the patch it lies deepest in */
} qsm_blend;

typedef enum qsm_log_level { QSM_LOG_INFO = 0, QSM_LOG_WARNING = 1 } qsm_log_level;

/* Where a network is computed. */
typedef enum qsm_device {
    QSM_DEVICE_AUTO = 0, /* a .plan on the GPU if there is one, else its graph on the CPU, which a
                            line of QSM_LOG_WARNING says; an .onnx file on the CPU */
    QSM_DEVICE_CPU = 1,  /* the graph; no GPU is looked for */
    QSM_DEVICE_GPU = 2   /* a .plan on the GPU, or an error */
} qsm_device;

enum { QSM_PATCH_AUTO = 0, QSM_PATCH_OFF = -1, QSM_OVERLAP_AUTO = -1 };

/* A network or a method, ready to run. */
typedef struct qsm_engine qsm_engine;

/* One acquisition. */
typedef struct qsm_scan {
    const float *local_field_ppm; /* shape voxels; not read outside the mask. The total field for a
                                     network that takes that: qsm_engine_card() says its task */
    const uint8_t *mask;          /* shape voxels, nonzero inside */
    int32_t shape[3];             /* voxels along (x, y, z) */
    double voxel_size_mm[3];      /* along (x, y, z), 0.01 to 100 mm */
    double b0_direction[3];       /* in voxel axes, of any non-zero norm; its sign has no meaning */
} qsm_scan;

/* What a method decided and found; 0 where that means nothing to it. */
typedef struct qsm_facts {
    double sigma_ppm;    /* noise of the field, from its spectrum on the magic cone */
    double alpha_ppm_mm; /* weight of the edges */
    double last_change;  /* |chi - chi_before| / |chi| of the last iteration */
    int32_t iterations;
} qsm_facts;

/* Made by qsm_default_params() only, then changed where it should differ. */
typedef struct qsm_params {
    size_t struct_size; /* leave as it is: tells a library of another version apart */

    /* For qsm_engine_open() and qsm_engine_open_method(). */
    int32_t threads; /* CPU threads; 0: one for each core */

    /* For qsm_reconstruct() and qsm_reconstruct_device(). */
    int32_t memory_order;        /* a qsm_memory_order */
    char axes[4];                /* ends of the head that x, y and z run to, such as "LPS"; "": not
                                    known */
    int32_t patch;               /* edge length [voxels], a multiple of the network's divisor;
                                    QSM_PATCH_OFF: the whole volume at once; QSM_PATCH_AUTO: that
                                    if it fits the memory, else patches that do */
    int32_t overlap;             /* voxels that neighbours share, or QSM_OVERLAP_AUTO */
    int32_t blend;               /* a qsm_blend */
    int32_t allow_geometry;      /* nonzero: use a network on a grid it was not trained for, which
                                    this library, unlike qsm-run, does not turn or resample */
    int32_t device;              /* a qsm_device, for qsm_engine_open(); here since it takes no room
                                    that programs compiled before it do not have */
    uint64_t memory_limit_bytes; /* of memory besides the caller's, that of the GPU where the
                                    engine is on one; 0: 4/5 of what is available */
    double data_consistency_lambda;      /* weight of the map against the field in a step from one
                                            towards the other; 0: no step; 0.01 is a good one */
    int32_t data_consistency_iterations; /* conjugate gradients in the mask, 10 are good;
                                            0: closed form, without mask */

    /* For qsm_reconstruct() with a method; 0 for its defaults, and with a network. */
    double alpha_ppm_mm; /* tv: weight of the edges, 1e-9 to 1000; 0: by the field's noise */
    int32_t iterations;  /* tv, at most 10,000; 0: 30 */
    double threshold;    /* tkd: smallest |D| divided by, 0.001 to 2/3; 0: 0.2 */
    qsm_facts *facts;    /* written on success; NULL: not asked for */

    /* Callbacks; NULL for none. */
    void (*progress)(int32_t done, int32_t total, void *user_data); /* after each patch, each
                                                                       step of data consistency,
                                                                       each iteration */
    int (*cancel)(void *user_data); /* asked before each of these, within an iteration of tv, and
                                       every 100 ms while a network runs on the CPU, which ends
                                       after the operator it is in; nonzero stops */
    void (*log)(int32_t level, const char *line, void *user_data); /* a qsm_log_level, a line
                                                                      without its end */
    void *user_data;                                               /* passed to all three */
} qsm_params;

/* Version of the library, for example "0.1.0". */
QSM_API const char *qsm_version(void);

/* The message of the calling thread's latest failure, one line; "" before any. */
QSM_API const char *qsm_last_error(void);

QSM_API qsm_params qsm_default_params(void);

/* Load a network: an .onnx file, or a .plan. `params` may be NULL for the defaults. On failure
 * *engine is NULL. A plan goes to the current GPU if there is one and this library was built with
 * TensorRT. There an engine that TensorRT refuses, being for another version or GPU, is an error:
 * this library builds none, but any run of qsm-run builds it again and says where. Elsewhere the
 * graph in the plan runs on the CPU, unless params.device is QSM_DEVICE_GPU; a plan of the former
 * form has none. */
QSM_API qsm_status qsm_engine_open(const char *path, const qsm_params *params,
                                   qsm_engine **engine);

/* A method of the name "tv" (total variation) or "tkd" (thresholded k-space division), on the CPU
 * and for any geometry, whole volumes only. */
QSM_API qsm_status qsm_engine_open_method(const char *method, const qsm_params *params,
                                          qsm_engine **engine);

/* The network's model card as JSON, valid until the engine is closed; NULL without a network. */
QSM_API const char *qsm_engine_card(const qsm_engine *engine);

/* Write the susceptibility [ppm] into shape voxels at `chi_ppm`, 0 outside the mask; of a network
 * for another task its output, such as a local field [ppm]. `chi_ppm` may be the memory of the
 * field. `params` may be NULL for the defaults. */
QSM_API qsm_status qsm_reconstruct(qsm_engine *engine, const qsm_scan *scan,
                                   const qsm_params *params, float *chi_ppm);

/* The same for a .plan whose engine runs, with pointers to the memory of the GPU it is on, in the
 * order QSM_Z_FASTEST. All work is enqueued on `stream` (a cudaStream_t), behind what the caller
 * has enqueued there, and done when the call returns: progress and cancel work as above. */
QSM_API qsm_status qsm_reconstruct_device(qsm_engine *engine, const qsm_scan *scan,
                                          const qsm_params *params, float *chi_ppm, void *stream);

/* Free an engine; NULL is none. */
QSM_API void qsm_engine_close(qsm_engine *engine);

#ifdef __cplusplus
}
#endif
#endif
