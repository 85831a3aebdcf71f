// Queued work of a stream that involves other ranks (nccl.c). All other work is done at once.
#pragma once
#include <cuda_runtime_api.h>
#include <stdbool.h>

#pragma GCC visibility push(hidden)

// Whether the environment variable ``name`` is set to a number other than 0.
bool is_set(const char *name);

// Number of the last queued work of any stream.
unsigned long long last_work(void);

// Whether the work of ``stream`` up to this number is done.
bool is_done(cudaStream_t stream, unsigned long long number);

// Do the work of ``stream`` up to this number, waiting for other ranks.
void finish(cudaStream_t stream, unsigned long long number);

// Do the work of all streams.
void finish_all(void);

#pragma GCC visibility pop
