"""What torch's CPU allocator is asked for during a call."""

from torch.profiler import ProfilerActivity, profile


def allocations(call):
    """Bytes of each allocation that torch's CPU allocator makes in a call whose results are kept."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    sizes = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [size for size in sizes if size > 0], kept


def bytes_of(results):
    return sorted(r.untyped_storage().nbytes() for r in results)
