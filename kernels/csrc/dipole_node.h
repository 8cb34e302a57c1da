// `qsm::DipoleConv`, the operator as a node of a graph: what its fields and shapes may be. No
// header of an inference engine is needed here, so that the tests can do without one.
//
//     x (n, c, x, y, z), voxel_size_mm (3), b0_direction (3) -> y, of the shape of x; float32, linear
//
// Fields: multiplier (text), threshold and lambda (float32, one each); all have defaults.
#ifndef QSM_DIPOLE_NODE_H
#define QSM_DIPOLE_NODE_H

#include <array>
#include <cstring>
#include <string>

#include "check_dipole.h"

namespace qsm {

constexpr const char *kNodeName = "DipoleConv", *kNodeVersion = "1";
constexpr int32_t kNodeInputs = 3, kNodeOutputs = 1, kNodeFields = 3;
constexpr const char *kInputNames[] = {"x", "voxel_size_mm", "b0_direction"};

// By qsm_cuda_multiplier.
constexpr const char *kMultiplierNames[] = {"dipole", "dipole_squared", "tkd", "tikhonov"};

enum class FieldType : int32_t { kText, kFloat32, kOther };

struct Field {
    const char *name;
    const void *data;
    FieldType type;
    int32_t length;  // letters or numbers
};

// What a node is told once, as its file keeps it.
struct DipoleNode {
    int32_t multiplier = QSM_CUDA_DIPOLE;
    float threshold = 0.12f, lambda = 0.01f;

    std::array<Field, kNodeFields> fields() const {
        const char *const name = kMultiplierNames[multiplier];
        return {{{"multiplier", name, FieldType::kText, static_cast<int32_t>(std::strlen(name))},
                 {"threshold", &threshold, FieldType::kFloat32, 1},
                 {"lambda", &lambda, FieldType::kFloat32, 1}}};
    }

    qsm_cuda_dipole op() const {
        qsm_cuda_dipole op = qsm_cuda_dipole_default();
        op.multiplier = multiplier;
        op.tkd_threshold = threshold;
        op.tikhonov_lambda = lambda;
        return op;
    }
};

inline Status read_multiplier(const Field &field, DipoleNode &node) {
    if (field.type != FieldType::kText || !field.data || field.length < 0) {
        return fail(QSM_CUDA_BAD_MULTIPLIER, "the field multiplier must be text");
    }
    std::string name(static_cast<const char *>(field.data), static_cast<size_t>(field.length));
    name.erase(name.find_last_not_of('\0') + 1);  // some callers count the end of the string
    for (int32_t kind = QSM_CUDA_DIPOLE; kind <= QSM_CUDA_TIKHONOV; ++kind) {
        if (name != kMultiplierNames[kind]) continue;
        node.multiplier = kind;
        return QSM_CUDA_OK;
    }
    return fail(QSM_CUDA_BAD_MULTIPLIER,
                "unknown multiplier '%.64s'; known are dipole, dipole_squared, tkd and tikhonov",
                name.c_str());
}

inline Status read_number(const Field &field, float &value) {
    if (field.type != FieldType::kFloat32 || !field.data || field.length != 1) {
        return fail(QSM_CUDA_BAD_MULTIPLIER, "the field %s must be one float32", field.name);
    }
    std::memcpy(&value, field.data, sizeof value);
    return QSM_CUDA_OK;
}

inline Status read_field(const Field &field, DipoleNode &node) {
    const std::string name = field.name ? field.name : "";
    if (name == "multiplier") return read_multiplier(field, node);
    if (name == "threshold") return read_number(field, node.threshold);
    if (name == "lambda") return read_number(field, node.lambda);
    return fail(QSM_CUDA_BAD_MULTIPLIER,
                "unknown field '%.64s'; known are multiplier, threshold and lambda", name.c_str());
}

// Sets `node` to what the fields say, the rest to its defaults.
inline Status read_node(const Field *fields, int32_t count, DipoleNode &node) {
    node = {};
    for (int32_t index = 0; index < count; ++index) QSM_TRY(read_field(fields[index], node));
    Multiplier g;
    return check_multiplier(node.op(), g);
}

struct Shape {
    const int64_t *sizes;  // -1 is not known yet
    int32_t rank;
};

// Checks what is known of the inputs' shapes.
inline Status check_inputs(const Shape *inputs, int32_t count) {
    if (count != kNodeInputs) {
        return fail(QSM_CUDA_BAD_SHAPE,
                    "%s takes x, voxel_size_mm and b0_direction, got %d inputs", kNodeName, count);
    }
    if (inputs[0].rank != 5) {
        return fail(QSM_CUDA_BAD_SHAPE, "x must be (n, c, x, y, z), got %d axes", inputs[0].rank);
    }
    for (int32_t index = 1; index < count; ++index) {
        const auto [sizes, rank] = inputs[index];
        if (rank == 1 && (sizes[0] == 3 || sizes[0] == -1)) continue;
        return fail(QSM_CUDA_BAD_SHAPE, "%s must have the shape (3)", kInputNames[index]);
    }
    return QSM_CUDA_OK;
}

// Sets batch and shape of an operator to those of x, all sizes known.
inline Status set_shape(const Shape &x, qsm_cuda_dipole &op) {
    int64_t sizes[4] = {1};  // samples and channels are volumes alike
    for (int axis = 0; axis < 5; ++axis) {
        const int64_t n = x.sizes[axis];
        if (n < 1 || n > kMostVoxels) {
            return fail(QSM_CUDA_BAD_SHAPE, "axis %d of x must have 1 to %lld voxels, got %lld",
                        axis, static_cast<long long>(kMostVoxels), static_cast<long long>(n));
        }
        int64_t &size = sizes[axis < 2 ? 0 : axis - 1];
        size = axis == 1 ? size * n : n;
    }
    if (sizes[0] > kMostVoxels) {
        return fail(QSM_CUDA_TOO_LARGE, "x has %lld volumes; split it",
                    static_cast<long long>(sizes[0]));
    }
    op.batch = static_cast<int32_t>(sizes[0]);
    for (int axis = 0; axis < 3; ++axis) op.shape[axis] = static_cast<int32_t>(sizes[axis + 1]);
    return check_size("a volume", op.shape, op.batch, "batch");
}

// Sets `bytes` to what a node needs for x of the largest shape and all between it and the smallest.
inline Status workspace_of(const DipoleNode &node, const Shape &smallest, const Shape &largest,
                           size_t &bytes) {
    qsm_cuda_dipole op = node.op();
    QSM_TRY(set_shape(largest, op));
    if (std::equal(largest.sizes, largest.sizes + 5, smallest.sizes)) {
        return qsm_cuda_dipole_workspace(&op, &bytes);
    }
    return qsm_cuda_dipole_workspace_bound(&op, &bytes);
}

// An operator of a known shape, and what it needs.
struct PreparedNode {
    qsm_cuda_dipole op = {};
    size_t workspace_bytes = 0;

    bool is_for(const Shape &x) const {
        qsm_cuda_dipole seen = op;
        return workspace_bytes > 0 && set_shape(x, seen) == QSM_CUDA_OK &&
               seen.batch == op.batch && std::equal(seen.shape, seen.shape + 3, op.shape);
    }
};

// Makes the plans of x's shape, so that nothing waits for the GPU later.
inline Status prepare(const DipoleNode &node, const Shape &x, PreparedNode &prepared) {
    PreparedNode made{node.op(), 0};
    size_t bound;
    prepared = {};
    QSM_TRY(set_shape(x, made.op));
    QSM_TRY(qsm_cuda_dipole_workspace(&made.op, &made.workspace_bytes));
    QSM_TRY(qsm_cuda_dipole_workspace_bound(&made.op, &bound));
    if (made.workspace_bytes > bound) {
        return fail(QSM_CUDA_SMALL_WORKSPACE,
                    "cuFFT needs %zu bytes for this shape, and at most %zu were expected; please "
                    "report it", made.workspace_bytes, bound);
    }
    prepared = made;
    return QSM_CUDA_OK;
}

}  // namespace qsm

#endif
