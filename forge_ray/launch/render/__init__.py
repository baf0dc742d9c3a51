"""Cluster manifests from one small typed configuration: `ray up` on AWS and GCP, KubeRay."""
