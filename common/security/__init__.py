"""Who may talk to whom: certificates, and the cluster's secret."""
