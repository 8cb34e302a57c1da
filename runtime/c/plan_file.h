// A plan as a file: the engine, and the ONNX graph that it was built from. docs/plan-file.md is the
// format, runtime/card/plan_file.py the other reader.
#ifndef QSM_RUNTIME_PLAN_FILE_H
#define QSM_RUNTIME_PLAN_FILE_H

#include <optional>
#include <string>

#include "card.h"
#include "error.h"

namespace qsm::host {

struct PlanFile {
    std::string engine;
    std::optional<std::string> graph;  // none in the former form
};

// Returns the parts of a plan, which are as they were written. Throws a data error if the file
// cannot be read, an engine error if it is truncated, damaged, or of a form that is not known here.
PlanFile read_plan(const std::string &path);

// Checks that an engine is of the network that the card of its graph names.
void require_same_network(const std::string &path, const std::string &engine, const Card &graph);

// What to say where the graph of a plan that has none is wanted.
Error no_graph(const std::string &path, const std::string &engine);

}  // namespace qsm::host

#endif
