"""What a job may do in a cloud, and nothing else: roles and policies for the prefixes it works on."""
