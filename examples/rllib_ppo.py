# %% [markdown]
# # RLlib: PPO by several processes, tried in the real env
#
# RLlib's env runners are processes that make their envs by the registered id; the prefix `aime_gym:` imports the
# package in each of them. With `gym_env_vectorize_mode="vector_entry_point"` the envs of a runner are one dream of many
# slots, which is one batched step of the model. Tested with `pip install "ray[rllib]==2.60.0"`, which pins gymnasium
# 1.2.2: give it a virtual environment of its own.
#
# RLlib takes every autoreset mode for Gymnasium's NEXT_STEP, in which the step after an end begins the next episode. It
# is the default of dreams, so leave `autoreset_mode` alone: with another one RLlib joins the end of an episode to the
# beginning of the next. (skrl looks at no mode at all: `examples/skrl_ppo.py` shows what is right there.)

# %%
import ray
from ray.rllib.algorithms.ppo import PPOConfig

DREAM, REAL = "aime_gym:AimeDream-Pendulum-v0", "aime_gym:AimeReal-Pendulum-v0"
ITERATIONS = 60
RUNNERS = 2
SLOTS = 64
EPISODE_STEPS = 200
EPISODES = 4

# %% [markdown]
# `overrides(env=...)` evaluates in the real env what learned in the dream. A real env has no vector entry point.

# %%
STEPS = RUNNERS * SLOTS * EPISODE_STEPS  # an iteration: an episode of every slot
config = (
    PPOConfig()
    .environment(DREAM, env_config={"max_episode_steps": EPISODE_STEPS})
    .env_runners(num_env_runners=RUNNERS, num_envs_per_env_runner=SLOTS, gym_env_vectorize_mode="vector_entry_point")
    .training(gamma=0.99, lr=3e-4, train_batch_size_per_learner=STEPS, minibatch_size=STEPS // 32, num_epochs=8)
    .evaluation(
        evaluation_interval=max(1, ITERATIONS // 6),
        evaluation_num_env_runners=0,
        evaluation_duration=EPISODES,
        evaluation_config=PPOConfig.overrides(
            env=REAL, env_config={}, num_envs_per_env_runner=1, gym_env_vectorize_mode="sync", explore=False
        ),
    )
    .debugging(seed=0)
)

# %%
ray.init(include_dashboard=False)
algorithm = config.build_algo()
for iteration in range(1, ITERATIONS + 1):
    result = algorithm.train()
    told = f"{iteration}: {result['env_runners']['episode_return_mean']:.0f} in the dream"
    if "evaluation" in result:
        told += f", {result['evaluation']['env_runners']['episode_return_mean']:.0f} in the real env"
    print(told, flush=True)
evaluated_in = algorithm.eval_env_runner.env.unwrapped.spec.id
algorithm.stop()
