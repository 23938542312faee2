// The logits of given tokens from a GGUF file: llama_logits MODEL TOKENS WINDOW LOGITS THREADS
//
// TOKENS holds int32 tokens, whole windows of them; LOGITS receives float32, a row of the vocabulary for every token.
// Every window is run by itself from position 0. The cache is float32 and attention unfused, so that nothing but the
// weights, and what the kernels make of them, differs between two files of one model. Prints the library's version.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

static void check(bool holds, const char * what) {
    if (!holds) {
        std::fprintf(stderr, "llama_logits: %s\n", what);
        std::exit(1);
    }
}

int main(int argc, char ** argv) {
    check(argc == 6, "MODEL TOKENS WINDOW LOGITS THREADS");
    const int window = std::atoi(argv[3]);
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) { std::fputs(text, stderr); }
    }, nullptr);

    llama_backend_init();
    ggml_backend_dev_t no_devices[] = {nullptr};  // the CPU, whatever else the library was built for
    llama_model_params loading = llama_model_default_params();
    loading.devices = no_devices;
    llama_model * model = llama_model_load_from_file(argv[1], loading);
    check(model != nullptr, "the model does not load");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = window;
    params.n_threads = params.n_threads_batch = std::atoi(argv[5]);
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    check(context != nullptr, "no context of this model");

    const std::streamsize row = llama_vocab_n_tokens(llama_model_get_vocab(model)) * sizeof(float);
    std::ifstream tokens(argv[2], std::ios::binary);
    std::ofstream logits(argv[4], std::ios::binary);
    llama_batch batch = llama_batch_init(window, 0, 1);
    batch.n_tokens = window;
    for (int i = 0; i < window; ++i) {
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    while (tokens.read(reinterpret_cast<char *>(batch.token), window * sizeof(llama_token))) {
        llama_memory_clear(llama_get_memory(context), true);
        check(llama_decode(context, batch) == 0, "a window does not decode");
        logits.write(reinterpret_cast<const char *>(llama_get_logits(context)), window * row);
    }
    check(tokens.eof() && tokens.gcount() == 0, "the tokens are not whole windows");
    check(static_cast<bool>(logits.flush()), "the logits are not written");
    std::printf("%s\n%s\n", llama_version(), ggml_commit());
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
