// What goes wrong, and how it leaves the library: as a status and one line, never as an exception.
#ifndef QSM_RUNTIME_ERROR_H
#define QSM_RUNTIME_ERROR_H

#include <cstddef>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "qsm_runtime.h"

namespace qsm::host {

class Error : public std::exception {
  public:
    Error(qsm_status status, std::string message) : status(status), message_(std::move(message)) {}
    const char *what() const noexcept override { return message_.c_str(); }

    const qsm_status status;

  private:
    std::string message_;
};

// There is no GPU here, or nothing in this library that runs engines.
struct NoGpu final : Error {
    explicit NoGpu(std::string why) : Error(QSM_ENGINE_ERROR, std::move(why)) {}
};

// There is a GPU, and an engine that is not for it.
struct Unfit final : Error {
    explicit Unfit(std::string why) : Error(QSM_ENGINE_ERROR, std::move(why)) {}
};

// Returns what printf would print.
std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Returns "(1, 0.86, 2)", as messages show vectors.
std::string vector_text(const double (&values)[3]);

// Returns a number of bytes as people read it.
std::string memory_text(double bytes);

// The last line of what a library had to say, where the reason stands.
std::string last_line(const std::string &message);

// Keeps the message for qsm_last_error(), as one line, and returns the status.
qsm_status keep(qsm_status status, const char *message) noexcept;

// Runs the body of a C function.
template <class Body>
qsm_status guarded(Body &&body) noexcept {
    try {
        body();
        return QSM_OK;
    } catch (const Error &error) {
        return keep(error.status, error.what());
    } catch (const std::bad_alloc &) {
        return keep(QSM_MEMORY_ERROR, "out of memory; free some, or set memory_limit_bytes lower");
    } catch (const std::exception &error) {
        return keep(QSM_INTERNAL_ERROR, error.what());
    } catch (...) {
        return keep(QSM_INTERNAL_ERROR, "an exception that is none of C++'s");
    }
}

}  // namespace qsm::host

#endif
