"""Reading a compressed-tensors repository of any maker: its modules, their weights and how they round inputs."""
