// The DLPack C ABI, declared from its written specification (major version 1): only what a
// consumer needs. A test compares every offset with the header that torch ships.
#pragma once
#include <cstdint>

namespace genfast::dl {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // may be null when ndim == 0
  int64_t* strides;  // in elements; null means contiguous (before version 1.2)
  uint64_t byte_offset;
};
struct Managed {  // capsule "dltensor"
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
struct ManagedVersioned {  // capsule "dltensor_versioned"
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;  // bit 0: read only
  Tensor tensor;
};
struct ExchangeApi {  // capsule "dlpack_exchange_api" on the tensor type
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor*, ManagedVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*from_object)(void* object, ManagedVersioned** out);
  int (*to_object)(ManagedVersioned*, void** out);
  int (*view)(void* object, Tensor* out);  // borrowed: valid while the object lives
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace genfast::dl
