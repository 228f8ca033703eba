"""What samplers are judged by: targets with exact scores, metrics, descriptions."""
