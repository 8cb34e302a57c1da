/* A host in plain C: loads a network, or takes a method by its name; reconstructs one volume, and
 * can be stopped with Ctrl-C.
 *
 *     cc -std=c99 main.c -I../../runtime/c -L../../runtime/c/build -lqsm_runtime \
 *        -Wl,-rpath,../../runtime/c/build -lm -o c_host
 *     ./c_host ../../runtime/models/tv-unet.onnx
 *     ./c_host tv
 *     ./c_host model.onnx field.f32 mask.u8 chi.f32  160 192 160  1 1 2  0 0 1
 *
 * The first forms make a phantom, a sphere of known susceptibility, and compare. The last reads
 * raw volumes, x fastest: the field [ppm] as float32 and the mask as bytes, then shape, voxel size
 * [mm] and B0 direction; it writes the map [ppm] as float32.
 */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qsm_runtime.h"

static volatile sig_atomic_t stopped = 0;

static void stop(int number) {
    (void)number;
    stopped = 1;
}

static int is_stopped(void *user_data) {
    (void)user_data;
    return stopped;
}

static void show_progress(int32_t done, int32_t total, void *user_data) {
    (void)user_data;
    fprintf(stderr, "%d of %d\n", (int)done, (int)total);
}

static void show_line(int32_t level, const char *line, void *user_data) {
    (void)user_data;
    fprintf(stderr, "%s%s\n", level == QSM_LOG_WARNING ? "warning: " : "", line);
}

static const double sphere_ppm = 0.1, sphere_radius_mm = 10, head_radius_mm = 26;

/* Distance from the centre of the volume [mm], and the cosine of the angle to B0 along z. */
static double distance(const qsm_scan *scan, const int at[3], double *cosine) {
    double squared = 0, along_z = 0;
    for (int axis = 0; axis < 3; ++axis) {
        double mm = (at[axis] - scan->shape[axis] / 2) * scan->voxel_size_mm[axis];
        squared += mm * mm;
        along_z = mm;
    }
    *cosine = squared > 0 ? along_z / sqrt(squared) : 0;
    return sqrt(squared);
}

/* The field of a sphere: that of a dipole outside, none inside. */
static double sphere_field_ppm(double mm, double cosine) {
    double ratio = sphere_radius_mm / mm;
    if (mm < sphere_radius_mm) return 0;
    return sphere_ppm / 3 * ratio * ratio * ratio * (3 * cosine * cosine - 1);
}

static void make_phantom(const qsm_scan *scan, float *field, uint8_t *mask) {
    int at[3];
    for (at[2] = 0; at[2] < scan->shape[2]; ++at[2]) {
        for (at[1] = 0; at[1] < scan->shape[1]; ++at[1]) {
            for (at[0] = 0; at[0] < scan->shape[0]; ++at[0]) {
                double cosine, mm = distance(scan, at, &cosine);
                *field++ = (float)sphere_field_ppm(mm, cosine);
                *mask++ = mm < head_radius_mm;
            }
        }
    }
}

/* Mean of the map in the sphere, and in the rest of the mask, away from the sphere's edge. */
static void judge_phantom(const qsm_scan *scan, const float *chi) {
    double sums[2] = {0, 0}, counts[2] = {0, 0};
    int at[3];
    for (at[2] = 0; at[2] < scan->shape[2]; ++at[2]) {
        for (at[1] = 0; at[1] < scan->shape[1]; ++at[1]) {
            for (at[0] = 0; at[0] < scan->shape[0]; ++at[0], ++chi) {
                double cosine, mm = distance(scan, at, &cosine);
                int outside = mm > sphere_radius_mm + 2;
                if (mm > head_radius_mm || (!outside && mm > sphere_radius_mm - 2)) continue;
                sums[outside] += *chi;
                counts[outside] += 1;
            }
        }
    }
    printf("sphere %.4f ppm, around it %.4f ppm, difference %.4f ppm of %.4f\n",
           sums[0] / counts[0], sums[1] / counts[1], sums[0] / counts[0] - sums[1] / counts[1],
           sphere_ppm);
}

static int read_all(const char *path, void *to, size_t bytes) {
    FILE *file = fopen(path, "rb");
    int whole = file && fread(to, 1, bytes, file) == bytes && fgetc(file) == EOF;
    if (file) fclose(file);
    if (!whole) fprintf(stderr, "%s: cannot be read, or does not have %zu bytes\n", path, bytes);
    return whole;
}

static int write_all(const char *path, const void *from, size_t bytes) {
    FILE *file = fopen(path, "wb");
    int whole = file && fwrite(from, 1, bytes, file) == bytes;
    if (file && fclose(file) != 0) whole = 0;
    if (!whole) fprintf(stderr, "%s: cannot be written\n", path);
    return whole;
}

static qsm_status open_engine(const char *model, const qsm_params *params, qsm_engine **engine) {
    const int is_method = strcmp(model, "tv") == 0 || strcmp(model, "tkd") == 0;
    return is_method ? qsm_engine_open_method(model, params, engine)
                     : qsm_engine_open(model, params, engine);
}

static int fail(const char *what, qsm_status status) {
    fprintf(stderr, "%s: %s\n", what, qsm_last_error());
    return (int)status;
}

int main(int count, char **arguments) {
    qsm_scan scan = {NULL, NULL, {64, 64, 64}, {1, 1, 1}, {0, 0, 1}};
    const int files = count == 14;
    if (count != 2 && !files) {
        fprintf(stderr, "usage: %s MODEL [FIELD MASK CHI  NX NY NZ  VX VY VZ  BX BY BZ]\n",
                arguments[0]);
        return QSM_USAGE_ERROR;
    }
    for (int axis = 0; files && axis < 3; ++axis) {
        scan.shape[axis] = atoi(arguments[5 + axis]);
        scan.voxel_size_mm[axis] = atof(arguments[8 + axis]);
        scan.b0_direction[axis] = atof(arguments[11 + axis]);
        if (scan.shape[axis] < 1 || scan.shape[axis] > 4096) {
            fprintf(stderr, "%s is no size of a volume\n", arguments[5 + axis]);
            return QSM_USAGE_ERROR;
        }
    }
    const size_t voxels = (size_t)scan.shape[0] * (size_t)scan.shape[1] * (size_t)scan.shape[2];
    float *field = malloc(voxels * sizeof *field), *chi = malloc(voxels * sizeof *chi);
    uint8_t *mask = malloc(voxels);
    scan.local_field_ppm = field;
    scan.mask = mask;
    signal(SIGINT, stop);

    qsm_engine *engine = NULL;
    qsm_params params = qsm_default_params();
    params.progress = show_progress;
    params.cancel = is_stopped;
    params.log = show_line;
    int result = 0;
    qsm_status status = QSM_OK;
    if (!field || !chi || !mask) {
        fprintf(stderr, "out of memory\n");
        result = QSM_MEMORY_ERROR;
    } else if (files && (!read_all(arguments[2], field, voxels * sizeof *field) ||
                         !read_all(arguments[3], mask, voxels))) {
        result = QSM_DATA_ERROR;
    } else if ((status = open_engine(arguments[1], &params, &engine)) != QSM_OK) {
        result = fail("cannot open the model", status);
    } else {
        if (!files) make_phantom(&scan, field, mask);
        status = qsm_reconstruct(engine, &scan, &params, chi);
        if (status != QSM_OK) {
            result = fail("cannot reconstruct", status);
        } else if (!files) {
            judge_phantom(&scan, chi);
        } else if (!write_all(arguments[4], chi, voxels * sizeof *chi)) {
            result = QSM_DATA_ERROR;
        }
    }
    qsm_engine_close(engine);
    free(mask);
    free(chi);
    free(field);
    return result;
}
