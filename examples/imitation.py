# %% [markdown]
# # Imitation from observation
#
# AIME learns from demonstrations that show what an expert saw and not what it did: it trains a policy, through the
# frozen model, to make what was seen likely (Zhang et al., NeurIPS 2023). The bundled demonstrations have no actions.

# %%
import aime_gym

UPDATES = 2000
EPISODES = 5

# %%
model = aime_gym.load_pretrained_model("walker-state")
aime = aime_gym.AIME(model, demonstrations="walker-walk", seed=0)
aime.learn(UPDATES)

# %% [markdown]
# Imitators act like any recurrent agent of SB3, in the world and in the dream.

# %%
agents = {"AIME": aime, "random": "random"}
print(aime_gym.compare(agents, "Walker", task="walk", model=model, episodes=EPISODES))
