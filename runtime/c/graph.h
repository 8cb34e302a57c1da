// What may stand in a model's graph, as runtime/card/graph.py has it.
#ifndef QSM_RUNTIME_GRAPH_H
#define QSM_RUNTIME_GRAPH_H

#include <string>

namespace qsm::host {

// Refuses the bytes of an ONNX file that may run without end, or that take minutes to be read:
// loops and branches, which networks of qsm-export do not have, and more nodes than any of theirs.
// Functions are no matter: OpenVINO puts none in the place of its call.
void require_bounded_graph(const std::string &path, const std::string &onnx);

}  // namespace qsm::host

#endif
