"""Configurations of `ray up` for clouds, from the same pools as the manifests of Kubernetes."""
