// Work that a stream was given and that nobody has waited for yet: what other ranks have a part in (nccl.c). All other
// work is done as soon as it is asked for.
#pragma once
#include <cuda_runtime_api.h>
#include <stdbool.h>

#pragma GCC visibility push(hidden)

// Whether the environment variable ``name`` is set to a number other than 0.
bool is_set(const char *name);

// Number of the work that was queued last, on any stream.
unsigned long long last_work(void);

// Whether all work of ``stream`` up to the one of this number is done.
bool is_done(cudaStream_t stream, unsigned long long number);

// Do the work of ``stream`` up to the one of this number, waiting for other ranks.
void finish(cudaStream_t stream, unsigned long long number);

// Do the work of all streams.
void finish_all(void);

#pragma GCC visibility pop
