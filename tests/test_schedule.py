"""Schedule and guidance against the reference's numbers."""

from __future__ import annotations

import pytest
import torch

from golden_model import assert_close, vectors
from lipstream.diffusion import schedule
from lipstream.diffusion.guidance import guided, sync_window_scale
from lipstream.diffusion.sampler import chunk_generator, few_step, generated_noise


@pytest.fixture
def data() -> dict[str, torch.Tensor]:
    return vectors("schedule")


def test_grids(data: dict[str, torch.Tensor]) -> None:
    for u_max in (0.999, 1.0):
        assert_close(schedule.shifted_grid(50, u_max), data[f"out.grid.tau_umax_{u_max}"], 1e-12)
    for steps in (50, 25, 4):
        assert_close(schedule.sampling_sigmas(steps), data[f"out.grid.flow_match_sigmas_{steps}_shift5"], 1e-6)
    tau = schedule.shifted_grid()
    table = {13: 0.93411, 20: 0.88209, 25: 0.83306, 30: 0.76893, 37: 0.63694, 40: 0.55525, 50: 0.0}
    for step, value in table.items():
        assert tau[step].item() == pytest.approx(value, abs=1e-5)


def test_distillation_time(data: dict[str, torch.Tensor]) -> None:
    t = schedule.distillation_time(data["in.dmd.uniform_draw_0_1"])
    assert_close(t, data["out.dmd.t"], 1e-12)
    draws = schedule.distillation_time(torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1])
    low, high = schedule.SYNC_WINDOW
    assert ((draws >= low) & (draws <= high)).double().mean().item() == pytest.approx(0.40, abs=0.01)


def test_teacher_training_times(data: dict[str, torch.Tensor]) -> None:
    index = torch.arange(1000)
    times = schedule.teacher_training_times(index)
    told = data["out.teacher_training.timesteps_1000_bf16"].double()
    assert torch.equal((1000 * times.t).round(decimals=6), told) and len(times.t.unique()) == 294
    assert_close(times.level, data["out.teacher_training.sigma_used_for_noising"].double(), 1e-6)
    assert_close(times.weight, data["out.teacher_training.weight_used"], 1e-6)
    some = schedule.teacher_training_times(index[[3, 700]])
    assert torch.equal(some.weight, times.weight[[3, 700]]) and some.t[0] == 1.0  # 999.4 -> 1000


def test_updates(data: dict[str, torch.Tensor]) -> None:
    x, v, eps, t, t_next = (data[f"in.{k}"] for k in ("x_t", "velocity", "eps", "t", "t_next"))
    x0 = schedule.x0_from_velocity(x, v, t)
    assert_close(x0, data["out.x0_fp32"], 1e-6)
    assert_close(schedule.renoise(x0, eps, t_next), data["out.renoised_fp32"], 1e-6)
    assert_close(schedule.implied_noise(x, x0, t), data["out.implied_eps_fp32"], 1e-6)
    assert_close(schedule.renoise(x0, schedule.implied_noise(x, x0, t), t_next), data["out.ode_next_fp32"], 1e-6)
    assert_close(schedule.velocity_from_x0(x, x0, t), v, 1e-4)
    half = schedule.x0_from_velocity(x.bfloat16(), v.bfloat16(), t)
    assert torch.equal(half, data["out.x0_bf16"])
    assert torch.equal(schedule.renoise(half, eps.bfloat16(), t_next), data["out.renoised_bf16"])


def test_diffusion_forcing_times(data: dict[str, torch.Tensor]) -> None:
    for suffix, frames in (("", 21), ("_T10", 10)):
        t = schedule.times_per_latent_frame(data[f"in.df.chunk_ids{suffix}"], frames, 3, schedule.STUDENT_TIMES)
        assert torch.equal(t, data[f"out.df.t_per_frame{suffix}"])
    noisy = schedule.add_noise(data["in.df.real"], data["in.df.eps"], data["in.df.t"])
    assert_close(noisy, data["out.df.noisy"], 1e-6)
    x0 = schedule.x0_from_velocity(noisy, data["in.df.velocity"], data["in.df.t"])
    assert_close(x0, data["out.df.x0"], 1e-6)
    assert_close(0.5 * (x0 - data["in.df.real"]).square().mean(), data["out.df.loss"], 1e-6)


def test_euler(data: dict[str, torch.Tensor]) -> None:
    sigmas = torch.cat((schedule.sampling_sigmas(int(data["in.euler.num_steps"])), torch.zeros(1)))
    x = data["in.euler.x"]
    for step, velocity in enumerate(data["in.euler.velocities"]):
        x = schedule.euler_step(x, velocity, sigmas[step], sigmas[step + 1])
        assert_close(x, data["out.euler.states"][step], 1e-6)


def test_windowed_guidance(data: dict[str, torch.Tensor]) -> None:
    cond, null, t = data["in.cfg.x0_cond"], data["in.cfg.x0_uncond"], data["in.cfg.t"]
    assert_close(guided(cond, null, sync_window_scale(t, 4.5)), data["out.cfg.windowed"], 1e-6)
    assert_close(guided(cond, null, sync_window_scale(t, 4.5, reverse=True)), data["out.cfg.reverse"], 1e-6)
    assert_close(guided(cond, null, 4.5), data["out.cfg.always"], 1e-6)
    assert torch.equal(guided(cond, null, 1.0), cond)
    half = guided(cond.bfloat16(), null.bfloat16(), sync_window_scale(t, 4.5))
    torch.testing.assert_close(half, data["out.cfg.windowed_bf16"], rtol=2**-7, atol=1e-6)


def test_chunk_noise_depends_on_seed_and_chunk_only() -> None:
    def draw(seed: int, chunk: int) -> torch.Tensor:
        return generated_noise(chunk_generator(seed, chunk), (1, 2, 3, 4, 4), torch.float32, "cpu")(0)

    assert torch.equal(draw(3, 5), draw(3, 5))
    seen = {draw(seed, chunk).sum().item() for seed in range(-2, 8) for chunk in range(10)}
    assert len(seen) == 100


def test_few_step_calls_and_gradients() -> None:
    calls: list[tuple[float, bool]] = []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append((t[0].item(), torch.is_grad_enabled()))
        return x * 0.5

    noise = generated_noise(chunk_generator(0, 0), (1, 1, 1, 2, 2), torch.float32, "cpu")
    few_step(denoise, noise, (0.999, 0.769))
    assert calls == [(0.999, False), (0.769, True)]
    calls.clear()
    few_step(denoise, noise, (0.999, 0.769), exit_call=0)
    assert calls == [(0.999, True)]
    with pytest.raises(ValueError, match="exit_call 2"):
        few_step(denoise, noise, (0.999, 0.769), exit_call=2)
