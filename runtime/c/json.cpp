#include "json.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <system_error>

namespace qsm::host {

namespace {

constexpr int kDeepest = 32;

class Reader {
  public:
    explicit Reader(const std::string &text) : text_(text) {}

    Json whole() {
        Json value = read(0);
        skip_space();
        if (at_ < text_.size()) fail("more after its end");
        return value;
    }

  private:
    [[noreturn]] void fail(const std::string &what) const {
        throw std::invalid_argument(what + " at character " + std::to_string(at_));
    }

    void skip_space() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }

    // The next character after any space, 0 at the end.
    char next() {
        skip_space();
        return at_ < text_.size() ? text_[at_] : '\0';
    }

    bool take(char wanted) {
        if (next() != wanted) return false;
        ++at_;
        return true;
    }

    void require(char wanted) {
        if (!take(wanted)) fail(std::string("expected ") + wanted);
    }

    Json read(int depth) {
        if (depth > kDeepest) fail("too deep");
        switch (next()) {
            case '{':
                return object(depth);
            case '[':
                return array(depth);
            case '"': {
                Json value;
                value.kind = Json::kString;
                value.string = string();
                return value;
            }
            default:
                return number_or_word();
        }
    }

    Json object(int depth) {
        Json value;
        value.kind = Json::kObject;
        require('{');
        if (take('}')) return value;
        do {
            if (next() != '"') fail("expected a name");
            std::string name = string();
            if (value.find(name)) fail("a second " + name);
            require(':');
            value.fields.emplace_back(std::move(name), read(depth + 1));
        } while (take(','));
        require('}');
        return value;
    }

    Json array(int depth) {
        Json value;
        value.kind = Json::kArray;
        require('[');
        if (take(']')) return value;
        do {
            value.items.push_back(read(depth + 1));
        } while (take(','));
        require(']');
        return value;
    }

    // Printable ASCII, as all text of a card is.
    std::string string() {
        std::string value;
        for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
            const unsigned code =
                text_[at_] == '\\' ? escaped() : static_cast<unsigned char>(text_[at_]);
            if (code < 0x20 || code > 0x7e) fail("a character other than printable ASCII");
            value += static_cast<char>(code);
        }
        if (at_ == text_.size()) fail("a string without end");
        ++at_;
        return value;
    }

    // Leaves at_ on the escape's last character.
    unsigned escaped() {
        static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        const char name = ++at_ < text_.size() ? text_[at_] : '\0';
        if (name == 'u') return hex4();
        const char *found = name ? std::strchr(names, name) : nullptr;
        if (!found) fail("an unknown escape");
        return static_cast<unsigned>(meanings[found - names]);
    }

    unsigned hex4() {
        unsigned code = 0;
        for (int digit = 0; digit < 4; ++digit) {
            const char c = ++at_ < text_.size() ? text_[at_] : '\0';
            const char *digits = "0123456789abcdef";
            const char *found =
                c ? std::strchr(digits, c | ('A' <= c && c <= 'F' ? 0x20 : 0)) : nullptr;
            if (!found) fail("expected four hexadecimal digits");
            code = code * 16 + static_cast<unsigned>(found - digits);
        }
        return code;
    }

    Json number_or_word() {
        const size_t end = text_.find_first_of(" \t\r\n,]}:", at_);
        const std::string word = text_.substr(at_, end == std::string::npos ? end : end - at_);
        Json value;
        if (word == "true" || word == "false") {
            value.kind = Json::kBool;
        } else if (word != "null") {
            number(word, value);
        }
        at_ += word.size();
        return value;
    }

    void number(const std::string &word, Json &value) const {
        size_t at = word[0] == '-' ? 1 : 0;
        const auto digits = [&] {
            const size_t first = at;
            while (at < word.size() && word[at] >= '0' && word[at] <= '9') ++at;
            return at - first;
        };
        const size_t first = at, whole = digits();
        bool right = whole == 1 || (whole > 1 && word[first] != '0');
        value.kind = Json::kInteger;
        if (right && at < word.size() && word[at] == '.') {
            ++at;
            right = digits() > 0;
            value.kind = Json::kReal;
        }
        if (right && at < word.size() && (word[at] == 'e' || word[at] == 'E')) {
            ++at;
            if (at < word.size() && (word[at] == '+' || word[at] == '-')) ++at;
            right = digits() > 0;
            value.kind = Json::kReal;
        }
        if (!right || at < word.size()) fail("expected a value");
        std::istringstream stream(word);
        stream.imbue(std::locale::classic());  // whatever the host's
        if (!(stream >> value.number)) fail("a number too large");
        const char *begin = word.c_str(), *end = begin + word.size();
        if (value.kind == Json::kInteger &&
            std::from_chars(begin, end, value.integer).ec != std::errc()) {
            value.kind = Json::kReal;
        }
    }

    const std::string &text_;
    size_t at_ = 0;
};

}  // namespace

const Json *Json::find(const std::string &name) const {
    for (const auto &[key, value] : fields) {
        if (key == name) return &value;
    }
    return nullptr;
}

Json parse_json(const std::string &text) { return Reader(text).whole(); }

}  // namespace qsm::host
