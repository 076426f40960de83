"""The processes: rollout, reward, learner, weights. Only workers.cluster imports Ray."""
