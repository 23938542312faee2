// A GGUF file that answers the requests of benchmarks/contenders/serve.py: llama MODEL THREADS
//
// Everything is as llama.cpp has it by default: micro-batches of 512, a cache in float16, flash attention where it is
// supported, weights mapped and repacked for this CPU. A state is a context; it is used again where its shape is asked for again.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "llama.h"

using Tokens = std::vector<llama_token>;

static void check(bool holds, const std::string & what) {
    if (!holds) {
        std::fprintf(stderr, "llama: %s\n", what.c_str());
        std::exit(1);
    }
}

struct State {
    llama_context * context = nullptr;
    int rows = 0, capacity = 0, past = 0;
    Tokens next;
};

// Decodes what `batch` holds and returns the likeliest token after each of its entries that want logits.
static Tokens run(llama_context * context, const llama_batch & batch) {
    check(llama_decode(context, batch) == 0, "a batch does not decode");
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));
    Tokens chosen;
    for (int i = 0; i < batch.n_tokens; ++i) {
        if (batch.logits[i]) {
            const float * logits = llama_get_logits_ith(context, i);
            chosen.push_back(std::max_element(logits, logits + vocabulary) - logits);
        }
    }
    return chosen;
}

static void add(llama_batch & batch, llama_token token, int position, int row, bool wanted) {
    const int i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = row;
    batch.logits[i] = wanted;
}

static void prompt(State & state, const Tokens & tokens, int length) {
    llama_memory_clear(llama_get_memory(state.context), false);
    const int most = llama_n_batch(state.context);
    llama_batch batch = llama_batch_init(most, 0, 1);
    state.next.clear();
    for (int row = 0; row < state.rows; ++row) {
        for (int start = 0; start < length; start += most) {
            const int end = std::min(start + most, length);
            batch.n_tokens = 0;
            for (int i = start; i < end; ++i) { add(batch, tokens[row * length + i], i, row, i + 1 == length); }
            for (llama_token token : run(state.context, batch)) { state.next.push_back(token); }
        }
    }
    llama_batch_free(batch);
    state.past = length;
}

static void step(State & state, llama_batch & batch) {
    batch.n_tokens = 0;
    for (int row = 0; row < state.rows; ++row) { add(batch, state.next[row], state.past, row, true); }
    state.next = run(state.context, batch);
    ++state.past;
}

static void print(const Tokens & tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) { std::printf("%s%d", i ? "," : "[", tokens[i]); }
    std::printf("]");
}

int main(int argc, char ** argv) {
    check(argc == 3, "MODEL THREADS");
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) { std::fputs(text, stderr); }
    }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    check(model != nullptr, "the model does not load");
    std::printf("{\"ready\":true}\n");
    std::fflush(stdout);

    std::map<std::string, State> states;
    std::string word, name;
    while (std::cin >> word >> name) {
        State & state = states[name];
        using Clock = std::chrono::steady_clock;
        Clock::time_point started;
        std::vector<Tokens> chosen;
        if (word == "prompt") {
            std::string path;
            int rows, length, capacity;
            std::cin >> path >> rows >> length >> capacity;
            Tokens tokens(static_cast<size_t>(rows) * length);
            std::ifstream file(path, std::ios::binary);
            check(static_cast<bool>(file.read(reinterpret_cast<char *>(tokens.data()), tokens.size() * sizeof(llama_token))), "no tokens in " + path);
            if (state.context == nullptr || state.rows != rows || state.capacity != capacity) {
                llama_free(state.context);
                llama_context_params params = llama_context_default_params();
                params.n_ctx = rows * ((capacity + 255) / 256 * 256);  // of every row, in whole blocks of its cache
                params.n_seq_max = rows;
                params.n_threads = params.n_threads_batch = std::atoi(argv[2]);
                state = {llama_init_from_model(model, params), rows, capacity};
                check(state.context != nullptr, "no context of this model");
            }
            started = Clock::now();
            prompt(state, tokens, length);
            chosen.push_back(state.next);
        } else {
            int steps;
            std::cin >> steps;
            llama_batch batch = llama_batch_init(state.rows, 0, 1);
            started = Clock::now();
            for (int i = 0; i < steps; ++i) {
                step(state, batch);
                chosen.push_back(state.next);
            }
            llama_batch_free(batch);
        }
        const double seconds = std::chrono::duration<double>(Clock::now() - started).count();
        std::printf("{\"seconds\":%.9f,\"tokens\":%s", seconds, word == "prompt" ? "" : "[");
        for (size_t i = 0; i < chosen.size(); ++i) {
            std::printf("%s", i ? "," : "");
            print(chosen[i]);
        }
        std::printf("%s}\n", word == "prompt" ? "" : "]");
        std::fflush(stdout);
    }
    for (auto & entry : states) { llama_free(entry.second.context); }
    llama_model_free(model);
    return 0;
}
