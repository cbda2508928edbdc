"""What Lo-Hp is compared with: generators that a user would try first."""
