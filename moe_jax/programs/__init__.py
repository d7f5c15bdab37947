"""What `moe_jax PROGRAM` runs, a module for each program."""
