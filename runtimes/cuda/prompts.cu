// Preloaded in front of libggml-cuda: long prompts are multiplied as BF16 matrices by cuBLAS, out of weights that are unpacked for it, and
// images' rows go to the GPU without detours (rows.h).
//
// Two of that library's functions are answered here, which it calls through its table of dynamic symbols: whether a product is computed
// on the quantised weights themselves, and what unpacks them to BF16. Its own unpacking of K-quants starts one warp for each 256
// values, which takes three times as long on an H200 (docs/LOG.md, 2026-11-29). Built and switched on by runtimes/dense.py.
#include "blocks.h"
#include "rows.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

enum ggml_type : int { TYPE_Q8_0 = 8, TYPE_Q4_K = 12, TYPE_Q6_K = 14 };
typedef void (*to_bf16_cuda_t)(const void *, nv_bfloat16 *, int64_t, cudaStream_t);
typedef bool (*should_use_mmq_t)(ggml_type, int, int64_t, int64_t);
typedef to_bf16_cuda_t (*get_to_bf16_t)(ggml_type);

constexpr int THREADS = 256, ROUNDS = 4;

// libggml-cuda's own, and of how many rows a product is dense.
static should_use_mmq_t own_should_use_mmq = nullptr;
static get_to_bf16_t own_get_to_bf16 = nullptr;
static int64_t least_rows = INT64_MAX;
static int used_device = 0;

// What cannot be computed must not be answered from whatever memory holds.
static void give_up(const char *what) {
    fprintf(stderr, "dense prompts: %s\n", what);
    abort();
}

bool ggml_cuda_should_use_mmq(ggml_type type, int cc, int64_t rows, int64_t experts) {
    if (!own_should_use_mmq) give_up("not switched on");
    return (rows < least_rows || experts > 0) && own_should_use_mmq(type, cc, rows, experts);
}

template <typename Block>
__global__ void __launch_bounds__(THREADS) unpack(const uint8_t *__restrict__ x, nv_bfloat16 *__restrict__ y, int64_t eighths) {
    const int64_t first = (int64_t) blockIdx.x * THREADS * ROUNDS + threadIdx.x;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int64_t at = first + round * THREADS;
        if (at >= eighths) return;
        constexpr int PER_BLOCK = Block::VALUES / 8;
        float values[8];
        Block::unpack(x + at / PER_BLOCK * Block::BYTES, at % PER_BLOCK, values);
        alignas(16) __nv_bfloat162 out[4];
        for (int i = 0; i < 4; ++i) out[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        *(uint4 *) (y + 8 * at) = *(uint4 *) out;
    }
}

template <typename Block> static void run(const void *x, nv_bfloat16 *y, int64_t values, cudaStream_t stream) {
    const int64_t eighths = values / 8, each = THREADS * ROUNDS;
    unpack<Block><<<(eighths + each - 1) / each, THREADS, 0, stream>>>((const uint8_t *) x, y, eighths);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) give_up(cudaGetErrorString(error));
}

to_bf16_cuda_t ggml_get_to_bf16_cuda(ggml_type type) {
    switch (type) {
        case TYPE_Q8_0: return run<Q80>;
        case TYPE_Q4_K: return run<Q4K>;
        case TYPE_Q6_K: return run<Q6K>;
        default: break;
    }
    if (!own_get_to_bf16) give_up("not switched on");
    return own_get_to_bf16(type);
}

extern "C" void ggml_backend_tensor_set(ggml_tensor *tensor, const void *data, size_t offset, size_t size) {
    if (!own_tensor_set) give_up("not switched on");
    set_tensor(tensor, data, offset, size);
}

extern "C" void ggml_backend_tensor_get(const ggml_tensor *tensor, void *data, size_t offset, size_t size) {
    if (!own_tensor_get) give_up("not switched on");
    get_tensor(tensor, data, offset, size);
}

// Memory that the GPU copies to and from by itself, for good. 0 where it is.
extern "C" int edgemed_pin(void *memory, size_t bytes) {
    if (cudaSetDevice(used_device) == cudaSuccess && cudaHostRegister(memory, bytes, cudaHostRegisterPortable) == cudaSuccess) return 0;
    cudaGetLastError();
    return 1;
}

// Before the first product: libggml-cuda's path, the GPU, and of how many rows a product is dense.
// 0; 1 where that file is not loaded, or is another version's; 2 where the GPU cannot run what was compiled.
extern "C" int edgemed_dense_prompts(const char *path, int device, int rows) {
    void *library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
    if (!library) return 1;
    own_should_use_mmq = (should_use_mmq_t) dlsym(library, "_Z24ggml_cuda_should_use_mmq9ggml_typeill");
    own_get_to_bf16 = (get_to_bf16_t) dlsym(library, "_Z21ggml_get_to_bf16_cuda9ggml_type");
    // libggml-base's, which that file depends on.
    own_tensor_set = (tensor_set_t) dlsym(library, "ggml_backend_tensor_set");
    own_tensor_get = (tensor_get_t) dlsym(library, "ggml_backend_tensor_get");
    own_get_name = (get_name_t) dlsym(library, "ggml_get_name");
    if (!own_should_use_mmq || !own_get_to_bf16 || !own_tensor_set || !own_tensor_get || !own_get_name) return 1;
    cudaFuncAttributes attributes;
    if (cudaSetDevice(device) != cudaSuccess || cudaFuncGetAttributes(&attributes, unpack<Q4K>) != cudaSuccess) return 2;
    least_rows = rows, used_device = device;
    return 0;
}
