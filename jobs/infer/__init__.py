"""The label job: source -> plan -> read -> label -> write -> commit."""
