#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 blockIdx, blockDim, gridDim;

namespace simt {

Thread* self = nullptr;
Options options;

namespace {

// ---- fibers -----------------------------------------------------------------------------------

constexpr size_t kStack = size_t{256} << 10;  // reserved; pages are taken when touched

struct Stacks {
  char* base = nullptr;
  size_t count = 0;
  void reserve(size_t n) {
    if (n <= count) return;
    if (base != nullptr) munmap(base, count * kStack);
    base = static_cast<char*>(mmap(nullptr, n * kStack, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) std::abort();
    count = n;
  }
} stacks;

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack and continues on the other: 2 ns, where
// swapcontext takes two system calls.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
void* prepare(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;  // return address of entry, and the alignment a call would leave
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#else
std::map<void*, std::unique_ptr<ucontext_t>> contexts;
void simt_switch(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}
void* prepare(char* stack, void (*entry)()) {
  auto& context = contexts[stack];
  context.reset(new ucontext_t);
  getcontext(context.get());
  context->uc_stack = {stack, 0, kStack};
  context->uc_link = nullptr;
  makecontext(context.get(), entry, 0);
  return context.get();
}
#endif

void* host_pointer;  // the scheduler's own stack
[[maybe_unused]] const void* host_bottom;
[[maybe_unused]] size_t host_size;

// ---- one block --------------------------------------------------------------------------------

struct Barrier {
  unsigned arrived = 0, wanted = 0, any = 0, count = 0;
  uint32_t generation = 0;
  Site site{};
  Votes result{};
};

struct Meeting {
  uint32_t mask = 0, arrived = 0, unread = 0, generation = 0;
  Site site{};
  unsigned char in[32][kSlot], out[32][kSlot];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned> order;
  unsigned live = 0;
  Barrier barriers[16];
  std::vector<std::unique_ptr<Meeting>> meetings;  // by warp * kMeetings + slot
  std::map<const void*, std::pair<std::unique_ptr<unsigned char, void (*)(void*)>, size_t>> shared;
  std::unique_ptr<unsigned char, void (*)(void*)> dynamic{nullptr, std::free};
  size_t dynamic_bytes = 0, static_bytes = 0, limit = 0;
  bool progressed = false;
  std::string error;
  void (*call)(const void*) = nullptr;
  const void* context = nullptr;
} block;

constexpr int kMeetings = 8;

unsigned char* poisoned(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 1024, std::max<size_t>(bytes, 1)) != 0) std::abort();
  memset(p, options.poison, bytes);
  return static_cast<unsigned char*>(p);
}

void to_host(bool last) {
  Thread* t = self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &t->fake_stack, host_bottom, host_size);
#else
  (void)last;
#endif
  simt_switch(&t->stack_pointer, host_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t->fake_stack, &host_bottom, &host_size);
#endif
}

void release(Barrier& b) {
  b.result = {b.any, b.count, b.arrived};
  b.arrived = b.any = b.count = 0;
  ++b.generation;
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_bottom, &host_size);
#endif
  block.call(block.context);
  if (self->n_copies != 0)
    fail("a thread returned with %d cp.async copies that it never waited for", self->n_copies);
  self->done = true;
  --block.live;
  Barrier& all = block.barriers[0];  // the others may have waited only for this thread
  if (all.arrived > 0 && all.wanted == 0 && all.arrived == block.live) release(all);
  to_host(true);
  std::abort();
}

void resume(Thread& t) {
  self = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(&fake, stacks.base + t.linear * kStack, kStack);
#endif
  simt_switch(&host_pointer, t.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  self = nullptr;
}

std::vector<unsigned> ordered(size_t n, uint64_t salt) {
  std::vector<unsigned> order(n);
  for (size_t i = 0; i < n; ++i) order[i] = static_cast<unsigned>(i);
  if (options.order == 1) std::reverse(order.begin(), order.end());
  if (options.order > 1) {
    std::mt19937_64 random(static_cast<uint64_t>(options.order) * 1000003 + salt);
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

const char* name_of(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

void report_deadlock() {
  std::string text = "divergent barrier or warp operation: ";
  std::map<std::string, int> places;
  for (const Thread& t : block.threads)
    places[t.done ? "returned"
                  : std::string(name_of(t.site.file)) + ":" + std::to_string(t.site.line)]++;
  for (const auto& p : places) text += std::to_string(p.second) + " threads at " + p.first + "; ";
  block.error = text;
}

void land(const Copy& c) {
  memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
  memset(static_cast<char*>(c.to) + c.bytes, 0, static_cast<size_t>(c.total - c.bytes));
}

void run_block(dim3 size, uint64_t salt) {
  block.live = static_cast<unsigned>(block.threads.size());
  for (Barrier& b : block.barriers) b = Barrier{};
  for (auto& m : block.meetings)
    if (m) m->mask = m->arrived = m->unread = 0;
  block.shared.clear();
  block.static_bytes = 0;
  block.dynamic.reset(poisoned(block.dynamic_bytes));
  for (unsigned i = 0; i < block.threads.size(); ++i) {
    Thread& t = block.threads[i];
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.linear = i, t.lane = i % 32, t.warp = i / 32;
    t.done = false, t.gate = nullptr, t.fake_stack = nullptr;
    t.n_copies = t.n_groups = 0;
    t.stack_pointer = prepare(stacks.base + i * kStack, entry);
  }
  block.order = ordered(block.threads.size(), salt);
  while (block.live > 0 && block.error.empty()) {
    block.progressed = false;
    for (unsigned i : block.order) {
      Thread& t = block.threads[i];
      if (t.done || (t.gate != nullptr && *t.gate == t.seen)) continue;
      t.gate = nullptr;
      block.progressed = true;
      resume(t);
      if (!block.error.empty()) return;
    }
    if (!block.progressed) report_deadlock();
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  char place[128];
  std::snprintf(place, sizeof place, " [block (%u, %u, %u), thread %u]", blockIdx.x, blockIdx.y,
                blockIdx.z, self->linear);
  block.error = std::string(text) + place;
  to_host(true);
  std::abort();
}

void wait(const uint32_t* gate, Site site) {
  self->gate = gate;
  self->seen = *gate;
  self->site = site;
  to_host(false);
}

Votes barrier(int id, int count, unsigned value, Site site) {
  if (id < 0 || id > 15) fail("%s:%d: barrier %d of 16", name_of(site.file), site.line, id);
  if (count % 32 != 0)
    fail("%s:%d: barrier for %d threads, not a multiple of 32", name_of(site.file), site.line,
         count);
  Barrier& b = block.barriers[id];
  if (b.arrived == 0) {
    b.site = site;
    b.wanted = static_cast<unsigned>(count);
  } else if (count == 0 && (b.site.line != site.line || b.site.file != site.file)) {
    fail("divergent barrier: some threads at %s:%d, others at %s:%d", name_of(b.site.file),
         b.site.line, name_of(site.file), site.line);
  } else if (b.wanted != static_cast<unsigned>(count)) {
    fail("%s:%d: barrier %d for %d threads meets one for %u", name_of(site.file), site.line, id,
         count, b.wanted);
  }
  b.any |= value;
  b.count += value != 0;
  if (++b.arrived == (b.wanted > 0 ? b.wanted : block.live))
    release(b);
  else
    wait(&b.generation, site);
  return b.result;
}

void meet(uint32_t mask, const void* in, int in_size, void* out, int out_size, MeetBody body,
          const void* context, Site site) {
  const unsigned lane = self->lane, warp = self->warp;
  if (!(mask >> lane & 1))
    fail("%s:%d: lane %u calls a warp operation with mask %08x", name_of(site.file), site.line,
         lane, mask);
  for (unsigned other = 0; other < 32; ++other) {
    const unsigned thread = warp * 32 + other;
    if ((mask >> other & 1) && (thread >= block.threads.size() || block.threads[thread].done))
      fail("%s:%d: mask %08x names lane %u, which %s", name_of(site.file), site.line, mask, other,
           thread >= block.threads.size() ? "does not exist" : "has returned");
  }
  Meeting* m = nullptr;
  if (block.meetings.size() < (warp + 1) * kMeetings) block.meetings.resize((warp + 1) * kMeetings);
  for (int pass = 0; pass < 2 && m == nullptr; ++pass)
    for (int i = 0; i < kMeetings; ++i) {
      auto& slot = block.meetings[warp * kMeetings + static_cast<unsigned>(i)];
      if (!slot) slot.reset(new Meeting());
      const bool open = slot->arrived != 0 && slot->mask == mask;
      if (pass == 0 ? open : slot->arrived == 0 && slot->unread == 0) {
        m = slot.get();
        break;
      }
    }
  if (m == nullptr) fail("%s:%d: too many warp operations at once", name_of(site.file), site.line);
  if (m->arrived == 0) {
    m->mask = mask;
    m->site = site;
  } else if (m->site.line != site.line || m->site.file != site.file) {
    fail("divergent warp operation: some lanes at %s:%d, others at %s:%d", name_of(m->site.file),
         m->site.line, name_of(site.file), site.line);
  }
  memcpy(m->in[lane], in, static_cast<size_t>(in_size));
  m->arrived |= uint32_t{1} << lane;
  if (m->arrived == mask) {
    body(m->in, m->out, mask, context);
    m->arrived = 0;
    m->unread = mask;
    ++m->generation;
  } else {
    wait(&m->generation, site);
  }
  if (out_size > 0) memcpy(out, m->out[lane], static_cast<size_t>(out_size));
  m->unread &= ~(uint32_t{1} << lane);
}

void* shared_array(const void* key, size_t bytes) {
  auto found = block.shared.find(key);
  if (found == block.shared.end()) {
    block.static_bytes += bytes;
    if (block.static_bytes > 48 * 1024)
      fail("%zu bytes of static shared memory; 49152 is the limit", block.static_bytes);
    if (block.static_bytes + block.dynamic_bytes > block.limit)
      fail("%zu bytes of shared memory; this kernel may have %zu",
           block.static_bytes + block.dynamic_bytes, block.limit);
    std::unique_ptr<unsigned char, void (*)(void*)> memory(poisoned(bytes), std::free);
    found = block.shared.emplace(key, std::make_pair(std::move(memory), bytes)).first;
  }
  return found->second.first.get();
}

void* dynamic_shared() { return block.dynamic.get(); }

// A copy lands when it is waited for, as late as a GPU may make it land: a missing wait shows. Or
// it lands at once: a copy over what another thread still reads shows.
void copy_async(void* to, const void* from, int bytes, int total) {
  Thread* t = self;
  if (t->n_copies == 256) fail("more than 256 cp.async copies in flight in one thread");
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) %
          static_cast<uintptr_t>(total) !=
      0)
    fail("cp.async of %d bytes at an address that is not a multiple of it", total);
  const Copy copy{to, from, bytes, total};
  if (options.early) land(copy);
  t->copies[t->n_copies++] = copy;
}

void copy_commit() {
  Thread* t = self;
  if (t->n_groups == 64) fail("more than 64 cp.async groups in flight");
  t->group_end[t->n_groups++] = t->n_copies;
}

void copy_wait(int keep) {
  Thread* t = self;
  const int groups = t->n_groups - keep;
  if (groups <= 0) return;
  const int end = t->group_end[groups - 1];
  for (int i = 0; i < end && !options.early; ++i) land(t->copies[i]);
  for (int i = end; i < t->n_copies; ++i) t->copies[i - end] = t->copies[i];
  t->n_copies -= end;
  for (int i = groups; i < t->n_groups; ++i) t->group_end[i - groups] = t->group_end[i] - end;
  t->n_groups -= groups;
}

const char* run(dim3 grid, dim3 size, size_t shared, size_t limit, void (*call)(const void*),
                const void* context) {
  static std::string text;
  const size_t threads = size_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535 || shared > limit)
    return "invalid configuration argument";
  stacks.reserve(threads);
  block.threads.resize(threads);
  block.dynamic_bytes = shared, block.limit = limit;
  block.call = call, block.context = context;
  block.error.clear();
  gridDim = grid, blockDim = size;
  ++options.launches;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  options.threads += static_cast<int64_t>(blocks * threads);
  const std::vector<unsigned> order = ordered(blocks, 7);
  for (unsigned b : order) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    run_block(size, b);
    if (!block.error.empty()) break;
  }
  block.dynamic.reset();
  block.shared.clear();
  text = block.error;
  return text.empty() ? nullptr : text.c_str();
}

}  // namespace simt

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_configure(int order, int poison, int early) {
  simt::options.order = order;
  simt::options.poison = poison;
  simt::options.early = early != 0;
}
SIMT_EXPORT void simt_device(int generation, int multiprocessor_kib) {
  simt::options.generation = generation;
  simt::options.multiprocessor_kib = multiprocessor_kib;
}
SIMT_EXPORT int64_t simt_launches() { return simt::options.launches; }
SIMT_EXPORT int64_t simt_threads() { return simt::options.threads; }
SIMT_EXPORT int64_t simt_matrices() { return simt::options.matrices; }
SIMT_EXPORT int64_t simt_products() { return simt::options.products; }
SIMT_EXPORT int64_t simt_conflicts() { return simt::options.conflicts; }
