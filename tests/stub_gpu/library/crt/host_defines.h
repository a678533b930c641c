// What NVIDIA's driver_types.h takes from its compiler's header of this name. pip's packages do not contain that header.
#pragma once
#define __host__
#define __device__
#define __device_builtin__
#define __cudart_builtin__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
#define CUDARTAPI
#define CUDART_CB
