// Shows the node's logic, which lies in a header, to the tests.
#include "dipole_node.h"

extern "C" {

QSM_CUDA_API int node_twin_read(const qsm::Field *fields, int32_t count, qsm::DipoleNode *node) {
    return qsm::read_node(fields, count, *node);
}

QSM_CUDA_API void node_twin_fields(const qsm::DipoleNode *node, qsm::Field *fields) {
    for (const qsm::Field &field : node->fields()) *fields++ = field;
}

QSM_CUDA_API int node_twin_check_inputs(const qsm::Shape *inputs, int32_t count) {
    return qsm::check_inputs(inputs, count);
}

QSM_CUDA_API int node_twin_workspace(const qsm::DipoleNode *node, const qsm::Shape *smallest,
                                     const qsm::Shape *largest, size_t *bytes) {
    return qsm::workspace_of(*node, *smallest, *largest, *bytes);
}

// Whether a node prepared for one shape takes another.
QSM_CUDA_API int node_twin_prepare(const qsm::DipoleNode *node, const qsm::Shape *x,
                                   const qsm::Shape *other, int32_t *takes_it,
                                   qsm_cuda_dipole *op) {
    qsm::PreparedNode prepared;
    QSM_TRY(qsm::prepare(*node, *x, prepared));
    *takes_it = prepared.is_for(*other);
    *op = prepared.op;
    return QSM_CUDA_OK;
}
}
