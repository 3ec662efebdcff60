// An image's rows from the tower to the model without detours (direct.py).
//
// From the tower: libmtmd fetches its result with ggml_backend_tensor_get into memory of its own, out of which it would have to be copied
// again; here it is fetched to where it stays.
//
// To the model: llama.cpp's batches of rows of numbers are copied four times on their way to the GPU. So llama.cpp is given a batch of
// token ids, an image's rows among them as ids that mean nothing. It looks all of them up on the CPU and copies the result to the GPU with
// ggml_backend_tensor_set, which is answered here: behind that copy the images' own rows are written over it.
//
// Compiled into prompts.cu, and by a C++ compiler into tests.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct ggml_tensor;
typedef void (*tensor_set_t)(ggml_tensor *, const void *, size_t, size_t);
typedef void (*tensor_get_t)(const ggml_tensor *, void *, size_t, size_t);
typedef const char *(*get_name_t)(const ggml_tensor *);

// Rows of a batch: the number of the first, how many, and where they lie.
struct Rows { int64_t first, count; const char *data; };

// libggml-base's own.
static tensor_set_t own_tensor_set = nullptr;
static tensor_get_t own_tensor_get = nullptr;
static get_name_t own_get_name = nullptr;
// Of the batch that this thread is running: its images' rows, a row's size, and how many rows have been copied to the GPU.
static thread_local const Rows *laid = nullptr;
static thread_local int laid_count = 0;
static thread_local int64_t row_bytes = 0, copied = 0;

// What lies there must stay until edgemed_rows_end, and the batch be run in this thread.
extern "C" void edgemed_rows_begin(const Rows *rows, int count, int64_t bytes) {
    laid = rows, laid_count = count, row_bytes = bytes, copied = 0;
}

// How many rows of the batch were seen on their way to the GPU: all of them, or this is another llama.cpp than it was made for.
extern "C" int64_t edgemed_rows_end() {
    laid_count = 0, row_bytes = 0;
    return copied;
}

// The copy on a device of llama.cpp's tensor "embd", which ggml's scheduler names CUDA0#embd#0.
inline bool is_looked_up(const ggml_tensor *tensor) { return strstr(own_get_name(tensor), "#embd#") != nullptr; }

inline void set_tensor(ggml_tensor *tensor, const void *data, size_t offset, size_t size) {
    own_tensor_set(tensor, data, offset, size);
    if (!row_bytes || !is_looked_up(tensor)) return;
    // A batch is run in micro-batches, in order.
    const int64_t begin = copied, end = begin + (int64_t) size / row_bytes;
    for (int i = 0; i < laid_count; ++i) {
        const Rows &rows = laid[i];
        const int64_t from = rows.first > begin ? rows.first : begin, last = rows.first + rows.count, to = last < end ? last : end;
        if (from >= to) continue;
        own_tensor_set(tensor, rows.data + (from - rows.first) * row_bytes, offset + (from - begin) * row_bytes, (to - from) * row_bytes);
    }
    copied = end;
}

// Where this thread wants a result of exactly so many bytes, and whether there was one.
static thread_local void *place = nullptr;
static thread_local size_t place_bytes = 0;
static thread_local bool fetched = false;

extern "C" void edgemed_fetch_begin(void *memory, size_t bytes) { place = memory, place_bytes = bytes, fetched = false; }

extern "C" int edgemed_fetch_end() {
    place = nullptr;
    return fetched;
}

inline void get_tensor(const ggml_tensor *tensor, void *data, size_t offset, size_t size) {
    const bool wanted = place && size == place_bytes;
    own_tensor_get(tensor, wanted ? place : data, offset, size);
    fetched = fetched || wanted;
}
