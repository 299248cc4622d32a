"""What a model says of data: the public `variational_bound` and `log_likelihood`."""
