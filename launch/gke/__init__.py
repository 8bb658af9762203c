"""JobSet manifests for TPU slices on Google Kubernetes Engine."""
