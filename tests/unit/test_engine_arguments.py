"""What vLLM's engine is told of the machine: on a card that it shares it must not ask for most of it."""

from rollout_server.engine import CPU_ARGUMENTS, where_it_runs


def test_on_a_card_of_its_own_vllm_decides() -> None:
    assert where_it_runs(on_gpu=True, max_model_len=4096, kv_cache_bytes=None) == {}


def test_with_a_size_for_its_cache_it_starts_on_a_card_that_others_have_nearly_filled() -> None:
    """vLLM refuses to start where `gpu_memory_utilization` of the card is not free, whatever size its KV cache is given."""
    arguments = where_it_runs(on_gpu=True, max_model_len=4096, kv_cache_bytes=8 << 30)
    assert 0 < arguments["gpu_memory_utilization"] <= 0.05


def test_on_cpu_a_whole_prompt_fits_one_step() -> None:
    for length in (64, 32_768):
        arguments = where_it_runs(on_gpu=False, max_model_len=length, kv_cache_bytes=1 << 30)
        assert arguments["max_num_batched_tokens"] >= length
        assert CPU_ARGUMENTS.items() <= arguments.items()
